"""Routers by name: the paper's heuristics, rules of current systems, and two that run the simulator forward."""

import inspect
from collections.abc import Callable
from itertools import combinations, product
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.errors import UserError, require_known
from jaxroute.routers import paper, planning, serving
from jaxroute.routers.choice import RuleRouter

Parameters = dict[str, float | int]
"""Parameters of a rule, by name."""


class RouterSpec(NamedTuple):
    """A named router, with everything that commands, tables, pictures and tuning need."""

    rule: Callable[..., jax.Array]  # its docstring has the rule and its source
    label: str  # in tables and pictures
    grid: Callable[[int], list[Parameters]] | None = None  # settings that tuning compares, for N experts


def _pairs_and_thresholds(num_experts: int) -> list[Parameters]:
    # One order per pair is enough: exchanging the two experts only changes the sign of the margin.
    pairs = list(combinations(range(num_experts), 2)) or [(0, 0)]
    thresholds = (-0.2, -0.1, -0.05, -0.025, 0.0, 0.025, 0.05, 0.1, 0.2)
    return [
        {"threshold": threshold, "strong": strong, "weak": weak}
        for (strong, weak), threshold in product(pairs, thresholds)
    ]


def _values(name: str, *values: float) -> Callable[[int], list[Parameters]]:
    return lambda num_experts: [{name: value} for value in values]


ROUTERS = {
    "round_robin": RouterSpec(paper.round_robin, "Round-Robin"),
    "shortest_queue": RouterSpec(paper.shortest_queue, "Shortest Queue First"),
    "bert_router": RouterSpec(paper.bert_router, "BERT Router"),
    "random": RouterSpec(serving.random, "Random"),
    "least_work": RouterSpec(serving.least_work, "Least Work"),
    "power_of_two": RouterSpec(serving.power_of_two, "Power of Two"),
    "latency_based": RouterSpec(
        serving.latency_based, "LiteLLM latency", _values("buffer", 0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
    ),
    "vllm_data_parallel": RouterSpec(serving.vllm_data_parallel, "vLLM data parallel"),
    "llm_d": RouterSpec(serving.llm_d, "llm-d"),
    "routellm": RouterSpec(serving.routellm, "RouteLLM", _pairs_and_thresholds),
    "score_minus_load": RouterSpec(
        serving.score_minus_load,
        "Score - Load",
        _values("weight", 0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.2, 0.5),
    ),
    "lookahead": RouterSpec(planning.lookahead, "Lookahead"),
    "clairvoyant": RouterSpec(planning.clairvoyant, "Clairvoyant"),
}
"""A new router is one entry here; configuration, help texts, tables and pictures follow from it."""

ROUTER_LABELS = {"trained": "Trained", **{name: spec.label for name, spec in ROUTERS.items()}}


def make_router(name: str, env: RoutingEnvironment, **parameters: Any) -> RuleRouter:
    """The router of this name for `env`. `parameters` override the defaults of its rule, and may be traced.

    Raises:
        UserError: no router has this name, the router has no such parameter, or a value cannot be one of it.
    """
    rule = ROUTERS[require_known(name, ROUTERS, "router")].rule
    own = {key: value for key, value in inspect.signature(rule).parameters.items() if value.kind is value.KEYWORD_ONLY}
    for key, value in parameters.items():
        require_known(key, own, f"parameter of the router {name}")
        if not isinstance(value, Tracer):
            _check_value(f"{name}: {key}", value, env.num_experts if isinstance(own[key].default, int) else None)
    return RuleRouter(rule, env, parameters)


def _check_value(what: str, value: Any, num_experts: int | None) -> None:
    """Raises `UserError` unless `value` is the number of one of `num_experts` experts; or, if it is None, finite."""
    array = np.asarray(value)
    numeric = array.ndim == 0 and array.dtype.kind in ("iu" if num_experts else "iuf")
    if numeric and (0 <= array < num_experts if num_experts else np.isfinite(array)):
        return
    wanted = f"the number of an expert, 0 to {num_experts - 1}" if num_experts else "a finite number"
    raise UserError(f"router {what} must be {wanted}, not {value!r}")
