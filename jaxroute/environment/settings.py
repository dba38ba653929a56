"""What is static of an environment: it changes shapes or code. Whatever may vary in a sweep is in `EnvParams`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxroute.environment.metrics import LEVELS, Level
from jaxroute.errors import UserError, known

Penalty = Literal["predicted", "paper", "exact", "off"]
QueueNodes = int | Literal["all"]
PENALTIES: tuple[Penalty, ...] = ("predicted", "paper", "exact", "off")


@dataclass(frozen=True)
class Settings:
    """Static settings of N experts behind a router. Raises `UserError` for a value that means nothing."""

    num_experts: int
    slots: int = 48  # S: requests that one expert holds, running and waiting; one more is a counted rejection
    queue_nodes: QueueNodes = 10  # K: running and waiting requests that are observed of each expert; "all": no limit
    episode_length: int = 5000  # requests
    obs: Literal["graph", "flat"] = "graph"  # a `GraphObservation`, or one flat vector
    penalty: Penalty = "predicted"  # form of the action impact estimator
    metrics: Level = "histogram"
    drop: bool = True  # whether a router may drop a request; if not, it may where no expert could take it

    def __post_init__(self) -> None:
        choices = {"obs": ("graph", "flat"), "penalty": PENALTIES, "metrics": LEVELS}
        for name, allowed in choices.items():
            known(getattr(self, name), allowed, name)
        for name in ("num_experts", "slots", "episode_length", "queue_nodes"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and (name, value) != ("queue_nodes", "all"):
                also = ", or 'all'" if name == "queue_nodes" else ""
                raise UserError(f"{name} must be a whole number of at least 1{also}, not {value!r}")

    @property
    def num_actions(self) -> int:
        """N + 1: send to expert 0..N-1, or drop."""
        return self.num_experts + 1
