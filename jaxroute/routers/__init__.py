"""Routers by name: the paper's heuristics, rules of current systems, and two that run the simulator forward."""

import inspect
from collections.abc import Callable
from itertools import combinations
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


class Range(NamedTuple):
    """The values of a parameter that tuning tries, from `low` to `high`; `log`: evenly in their logarithm."""

    low: float
    high: float
    log: bool = False


class RouterSpec(NamedTuple):
    """A named router, with everything that commands, tables, pictures and tuning need."""

    rule: Callable[..., jax.Array]  # its docstring has the rule and its source
    label: str  # in tables and pictures
    ranges: dict[str, Range] = {}  # of the parameters that tuning searches
    choices: Callable[[int], list[Parameters]] = lambda num_experts: [{}]  # of N experts, tried too


def _pairs(num_experts: int) -> list[Parameters]:
    # One order per pair is enough: exchanging the two experts only changes the sign of the margin.
    pairs = list(combinations(range(num_experts), 2)) or [(0, 0)]
    return [{"strong": strong, "weak": weak} for strong, weak in pairs]


ROUTERS = {
    "round_robin": RouterSpec(paper.round_robin, "Round-Robin"),
    "shortest_queue": RouterSpec(paper.shortest_queue, "Shortest Queue First"),
    "bert_router": RouterSpec(paper.bert_router, "BERT Router"),
    "random": RouterSpec(serving.random, "Random"),
    "least_work": RouterSpec(serving.least_work, "Least Work"),
    "power_of_two": RouterSpec(serving.power_of_two, "Power of Two"),
    "latency_based": RouterSpec(serving.latency_based, "LiteLLM latency", {"buffer": Range(0, 2)}),
    "vllm_data_parallel": RouterSpec(serving.vllm_data_parallel, "vLLM data parallel"),
    "llm_d": RouterSpec(serving.llm_d, "llm-d"),
    "routellm": RouterSpec(serving.routellm, "RouteLLM", {"threshold": Range(-0.2, 0.2)}, _pairs),
    "score_minus_load": RouterSpec(serving.score_minus_load, "Score - Load", {"weight": Range(1e-4, 0.5, log=True)}),
    "index_rule": RouterSpec(
        serving.index_rule,
        "Index rule",
        {
            "load_weight": Range(1e-4, 0.3, log=True),
            "length_weight": Range(-0.2, 0.3),
            "threshold": Range(-1, 0.9),
            "cap": Range(1, 300, log=True),
        },
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
