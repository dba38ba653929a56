"""The static settings of an environment, which change shapes or code. `EnvParams` has what a sweep may vary."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxroute.environment.metrics import Level
from jaxroute.errors import UserError, require_known

Penalty = Literal["predicted", "paper", "exact", "off"]
QueueNodes = int | Literal["all"]
Features = Literal["standard", "relative"]
Signals = Literal["requests", "counts"]
PrefixShare = Literal["off", "estimated", "exact"]


@dataclass(frozen=True)
class Settings:
    """Static settings of N experts behind a router. Raises `UserError` for an invalid value."""

    num_experts: int
    slots: int = 48  # S: requests that an expert can hold, running and waiting; a further one is rejected
    queue_nodes: QueueNodes = 10  # K: observed running, and observed waiting, requests of each expert; "all": no limit
    episode_length: int = 5000  # requests
    obs: Literal["graph", "flat"] = "graph"  # a `GraphObservation`, or one flat vector
    penalty: Penalty = "predicted"  # form of the action impact estimator
    metrics: Level = "histogram"
    drop: bool = True  # whether dropping is always allowed; if not, only if no expert is allowed
    features: Features = "standard"  # of experts: in units of the configuration, or of what each can serve in time
    signals: Signals = "requests"  # what engines export: every request, or only how many there are and the KV use
    prefix_share: PrefixShare = "off"  # the observed share of the prompt that experts hold; off: prompts share nothing
    prefix_record: int = 128  # M: sent requests that the router remembers for its estimate

    def __post_init__(self) -> None:
        choices = {"obs": ("graph", "flat"), "penalty": get_args(Penalty), "metrics": get_args(Level)}
        choices |= {"features": get_args(Features), "signals": get_args(Signals)}
        choices["prefix_share"] = get_args(PrefixShare)
        for name, allowed in choices.items():
            require_known(getattr(self, name), allowed, name)
        for name in ("num_experts", "slots", "episode_length", "queue_nodes", "prefix_record"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and (name, value) != ("queue_nodes", "all"):
                also = ", or 'all'" if name == "queue_nodes" else ""
                raise UserError(f"{name} must be a whole number of at least 1{also}, not {value!r}")
        if self.drop not in (True, False):
            raise UserError(f"drop must be True or False, not {self.drop!r}")

    @property
    def num_actions(self) -> int:
        """N + 1: experts 0..N-1, and dropping."""
        return self.num_experts + 1
