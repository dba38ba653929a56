"""What a suite compares, on which episodes, and with which budgets. A version never changes: see `SUITES`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import make
from jaxroute.environment.state import EnvParams
from jaxroute.errors import require_known
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.routers.choice import Router

Runs = list[list[float]]
"""QoS per request of each episode, for each run of a router: one for a rule, one a seed for a trained router."""

Column = dict[str, dict[str, Runs]]
"""The results of a router: environment -> set of episodes, evaluation or short -> runs."""


class Episodes(NamedTuple):
    """Fresh episodes, with the same requests for every router."""

    number: int
    length: int  # requests of each
    seed: int


@dataclass(frozen=True)
class Suite:
    """A version of a suite."""

    name: str
    environments: tuple[str, ...]  # registered names
    trained: dict[str, tuple[str, ...]]  # column -> changes of the default configuration, such as "network.kind=flat"
    seeds: tuple[int, ...]  # of the trainings
    decisions: int  # most simulated decisions of a training, and those that both reported rules are tuned with
    index_rule: str  # this and the following are names of routers
    rules: tuple[str, ...]  # the best of them is the best other rule
    rule_decisions: int  # that each of them is tuned with before
    ceiling: str  # if it follows another router in its simulations, that is the index rule
    selection: Episodes  # on which the best rule is chosen
    evaluation: Episodes  # of every router but the ceiling, which takes too long
    short: Episodes  # of every router, the ceiling included
    engine: str | None = None  # the version of vLLM that every expert runs with its defaults; None: each environment's
    untuned: tuple[str, ...] = ()  # routers with nothing to tune that have a column each, and are no rules

    @property
    def columns(self) -> tuple[str, ...]:
        """The suite's own columns, in the order of its table."""
        first, *others = self.trained
        return first, "index_rule", *others, *self.untuned, "best_other_rule", "ceiling"

    @property
    def options(self) -> dict[str, str]:
        """Options of `make` with which the suite's environments differ from the registered ones."""
        return {} if self.engine is None else {"engine": self.engine}

    def make(self, environment: str, episodes: Episodes) -> tuple[RoutingEnvironment, EnvParams]:
        """An environment of the suite with episodes of this length, and its parameters. Raises `UserError`."""
        require_known(environment, self.environments, f"environment of {self.name}")
        return make(environment, episode_length=episodes.length, **self.options)

    def evaluate(
        self,
        router_for: Callable[[RoutingEnvironment, EnvParams], Router],
        environments: Sequence[str] | None = None,
        sets: Sequence[str] = ("evaluation", "short"),
    ) -> Column:
        """The column of one run of the router that `router_for(env, params)` returns.

        `environments` are by default all of the suite. Raises `UserError` for an unknown one.
        """
        column: Column = {}
        for name in self.environments if environments is None else environments:
            column[name] = {}
            for kind in sets:
                episodes: Episodes = getattr(self, kind)
                env, params = self.make(name, episodes)
                routers = {"router": router_for(env, params)}
                values = evaluate_routers(env, params, routers, episodes.number, episodes.seed)["router"]
                column[name][kind] = [values["qos"].astype(float).tolist()]
        return column

    @property
    def digest(self) -> str:
        """SHA-256 of the description, in hexadecimal; what an earlier version knew nothing of does not change it."""
        defaults = {field.name: field.default for field in fields(self)}
        told = {name: value for name, value in asdict(self).items() if getattr(self, name) != defaults[name]}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


_V1 = Suite(
    name="routing-v1",
    environments=(
        "paper-3",
        "paper-6",
        "overload-3",
        "bursts-3",
        "slowdown-3",
        "failure-3",
        "quality-3",
        "rtx4090-3",
        "a100-3",
        "mixed-3",
        "measured-3",
        "memory-3",
        "memory-6",
        "long-prompts-3",
    ),
    trained={"trained": (), "baseline_rl": ("network.kind=flat", "environment.penalty=off")},
    seeds=(0, 1, 2),
    decisions=6_000_000,
    index_rule="index_rule+admission",
    rules=(
        "round_robin+admission",
        "shortest_queue",
        "shortest_queue+admission",
        "least_work",
        "least_work+admission",
        "power_of_two+admission",
        "latency_based+admission",
        "vllm_data_parallel+admission",
        "vllm_data_parallel_v0_10+admission",
        "llm_d+admission",
        "routellm+admission",
        "score_minus_load+admission",
        "feasible_best",
        "route_balance+admission",
        "block+admission",
        "lookahead",
    ),
    rule_decisions=400_000,
    ceiling="rollout_clairvoyant",
    selection=Episodes(8, 2500, 2_000_000),
    evaluation=Episodes(20, 5000, 1_000_000),
    short=Episodes(4, 1000, 3_000_000),
)
_V2 = replace(
    _V1,
    name="routing-v2",
    environments=(*_V1.environments, "chat-3", "documents-3", "agents-3"),
    index_rule="index_rule_prefix+admission",
    rules=(*_V1.rules, "llm_d_prefix+admission", "dynamo_kv+admission", "sglang_cache_aware+admission"),
    engine="vllm-0.33",
    untuned=("universal",),
)

SUITES = {suite.name: suite for suite in (_V1, _V2)}
"""Suites by name. None ever changes: another set of environments, seeds or budgets is another version."""


def suite(name: str) -> Suite:
    """The suite of this name, such as "routing-v1". Raises `UserError` for an unknown one."""
    return SUITES[require_known(name, SUITES, "suite")]
