"""Routers by name: the paper's heuristics, rules of current systems, and those that run the simulator forward."""

import inspect
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.errors import UserError, require_known
from jaxroute.routers import linear, paper, planning, prefixes, rollout, serving
from jaxroute.routers.choice import Router, RuleRouter

Parameters = dict[str, float | int]
"""Numbers of a rule, by name."""


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
    fixed: Parameters = {}  # parameters that make_router sets, unless they are given
    choices: Callable[[int], list[Parameters]] = lambda num_experts: [{}]  # of N experts, tried too
    follows: str | None = None  # the router that its parameter `policy` is, unless another one is given
    knows_future: bool = False  # see `RuleRouter`
    honest: bool = True  # reads only what a router can know; else true lengths and scores


def _pairs(num_experts: int) -> list[Parameters]:
    # One order per pair is enough: exchanging the two experts only changes the sign of the margin.
    pairs = list(combinations(range(num_experts), 2)) or [(0, 0)]
    return [{"strong": strong, "weak": weak} for strong, weak in pairs]


_EXPERTS = ("strong", "weak")  # parameters that are the number of an expert

_ADMISSION = {"admission": Range(0.5, 2, log=True)}

_INDEX_RULE = {
    "load_weight": Range(1e-4, 0.3, log=True),
    "length_weight": Range(-0.2, 0.3),
    "threshold": Range(-1, 0.9),
    "cap": Range(1, 300, log=True),
}

_RULES = {
    "round_robin": RouterSpec(paper.round_robin, "Round-Robin"),
    "shortest_queue": RouterSpec(paper.shortest_queue, "Shortest Queue First"),
    "bert_router": RouterSpec(paper.bert_router, "BERT Router"),
    "random": RouterSpec(serving.random, "Random"),
    "least_work": RouterSpec(serving.least_work, "Least Work"),
    "power_of_two": RouterSpec(serving.power_of_two, "Power of Two"),
    "latency_based": RouterSpec(serving.latency_based, "LiteLLM latency", {"buffer": Range(0, 2)}),
    "vllm_data_parallel": RouterSpec(serving.vllm_data_parallel, "vLLM data parallel"),
    "vllm_data_parallel_v0_10": RouterSpec(serving.vllm_data_parallel_v0_10, "vLLM 0.10 data parallel"),
    "llm_d": RouterSpec(serving.llm_d, "llm-d"),
    "routellm": RouterSpec(serving.routellm, "RouteLLM", {"threshold": Range(-0.2, 0.2)}, choices=_pairs),
    "score_minus_load": RouterSpec(serving.score_minus_load, "Score - Load", {"weight": Range(1e-4, 0.5, log=True)}),
    "index_rule": RouterSpec(serving.index_rule, "Index rule", _INDEX_RULE),
    "llm_d_prefix": RouterSpec(serving.llm_d, "llm-d, prefixes", fixed={"load_weight": 0.0, "prefix_weight": 3.0}),
    "dynamo_kv": RouterSpec(
        prefixes.dynamo_kv, "Dynamo KV", {"overlap_weight": Range(0.05, 20, log=True), "temperature": Range(0, 1)}
    ),
    "sglang_cache_aware": RouterSpec(
        prefixes.sglang_cache_aware,
        "SGLang cache-aware",
        {"cache_threshold": Range(0, 1), "balance_abs_threshold": Range(1, 64, log=True)},
    ),
    "index_rule_prefix": RouterSpec(
        serving.index_rule,
        "Index rule, prefixes",
        {**_INDEX_RULE, "prefix_weight": Range(1e-3, 1, log=True)},
        {"prefix_weight": 0.1},
    ),
    "feasible_best": RouterSpec(paper.bert_router, "Feasible best", _ADMISSION, {"admission": 1.0}),
    "route_balance": RouterSpec(
        serving.route_balance,
        "RouteBalance",
        {"latency_weight": Range(1e-3, 10, log=True), "cost_weight": Range(1e-4, 1, log=True)},
    ),
    "universal": RouterSpec(linear.universal, "Universal"),
    "block": RouterSpec(planning.block, "Block"),
    "lookahead": RouterSpec(planning.lookahead, "Lookahead"),
    "clairvoyant": RouterSpec(planning.clairvoyant, "Clairvoyant", honest=False),
    "rollout": RouterSpec(rollout.rollout, "Rollout", follows="index_rule+admission"),
    "rollout_clairvoyant": RouterSpec(
        rollout.rollout_clairvoyant,
        "Rollout, clairvoyant",
        follows="index_rule+admission",
        knows_future=True,
        honest=False,
    ),
}
"""A new router is one entry here; configuration, help texts, tables and pictures follow from it."""

# `bert_router` with admission is `feasible_best`, and the universal and the planning routers drop on their own.
_WITHOUT_ADMISSION = (
    "bert_router",
    "feasible_best",
    "universal",
    "lookahead",
    "clairvoyant",
    "rollout",
    "rollout_clairvoyant",
)
_WITH_ADMISSION = {
    f"{name}+admission": spec._replace(
        label=f"{spec.label} + admission", ranges={**spec.ranges, **_ADMISSION}, fixed={"admission": 1.0}
    )
    for name, spec in _RULES.items()
    if name not in _WITHOUT_ADMISSION
}

ROUTERS = {**_RULES, **_WITH_ADMISSION}

ROUTER_LABELS = {"trained": "Trained", **{name: spec.label for name, spec in ROUTERS.items()}}


SLOW = tuple(name for name, spec in ROUTERS.items() if spec.follows)
"""Routers that simulate thousands of decisions for each of their own."""


def make_router(name: str, env: RoutingEnvironment, **parameters: Any) -> RuleRouter:
    """The router of this name for `env`. `parameters` override the defaults of its rule, and may be traced.

    Every router has a parameter `admission`: requests are dropped unless some expert's predicted latency is below it
    times the limit (`RuleRouter`). The default is to admit all, and 1 for names that end in +admission. The rollouts
    have a parameter `policy`, any router; the default is index_rule+admission.

    Raises:
        UserError: no router has this name, the router has no such parameter, or a value cannot be one of it.
    """
    spec = ROUTERS[require_known(name, ROUTERS, "router")]
    rule, parameters = spec.rule, {**spec.fixed, **parameters}
    policy: Router | None = parameters.pop("policy", None) if spec.follows else None
    own = {key: value for key, value in inspect.signature(rule).parameters.items() if value.kind is value.KEYWORD_ONLY}
    for key, value in parameters.items():
        require_known(key, [*own, "admission"], f"parameter of the router {name}")
        if not isinstance(value, Tracer):
            _check_value(f"{name}: {key}", value, env.num_experts if key in _EXPERTS else None)
    if spec.follows:
        if policy is not None and not callable(policy):
            raise UserError(f"router {name}: policy must be a router, not {policy!r}")
        parameters["policy"] = make_router(spec.follows, env) if policy is None else policy
    return RuleRouter(rule, env, parameters, spec.knows_future, sees_all=not spec.honest)


def _check_value(what: str, value: Any, num_experts: int | None) -> None:
    """Raises `UserError` unless `value` is the number of one of `num_experts` experts; or, if it is None, finite."""
    array = np.asarray(value)
    numeric = array.ndim == 0 and array.dtype.kind in ("iu" if num_experts else "iuf")
    if numeric and (0 <= array < num_experts if num_experts else np.isfinite(array)):
        return
    wanted = f"the number of an expert, 0 to {num_experts - 1}" if num_experts else "a finite number"
    raise UserError(f"router {what} must be {wanted}, not {value!r}")
