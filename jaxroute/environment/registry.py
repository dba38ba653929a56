"""Named environments: `jaxroute.make("paper-3")` gives an environment and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, known
from jaxroute.simulator.profiles import EXPERTS, cluster, engine_profiles
from jaxroute.workload.arrivals import PoissonArrivals
from jaxroute.workload.requests import FrozenRequests
from jaxroute.workload.workload import Workload

PAPER_PENALTY = {"chatglm-6b": (6.8e-5, 2.5e-5)}
"""k1, k2 of the paper's penalty by expert, s (its first author's constants); `PAPER_PENALTY_DEFAULT` for the others."""

PAPER_PENALTY_DEFAULT = (7.2e-5, 2.5e-5)

SCENARIOS = {
    "paper-3": tuple(EXPERTS)[:3],
    "paper-6": tuple(EXPERTS)[:6],
}
"""Experts of each registered environment."""


def make_params(
    experts: Sequence[str],
    profile: str | Sequence[str] = "paper",
    workload: Workload | None = None,
    latency_limit: float | None = None,
    penalty_weight: float = 1.0,
    kv_cache_tokens: int | Sequence[int] | None = None,
) -> EnvParams:
    """Parameters of a cluster of these experts; by default as the frozen scenario, at 3 requests/s (section 7).

    `profile` and `kv_cache_tokens` are one for all or one for each expert; `latency_limit` is in s per output token.
    None takes the profile's own. Raises `UserError`.
    """
    profiles = engine_profiles(experts, profile)
    if workload is None:
        scores = [EXPERTS[expert].mean_score for expert in experts]
        workload = Workload.create(PoissonArrivals.create(3.0), FrozenRequests.create(scores))
    if workload.num_experts != len(experts):
        raise UserError(f"the workload is for {workload.num_experts} experts, the cluster has {len(experts)}")
    limit = max(own.latency_limit for own in profiles) if latency_limit is None else latency_limit
    if not 0 < limit < float("inf"):
        raise UserError(f"latency_limit must be above 0 (seconds per output token), not {limit}")
    penalty = [PAPER_PENALTY.get(expert, PAPER_PENALTY_DEFAULT) for expert in experts]
    return EnvParams(
        workload=workload,
        engines=cluster(experts, profiles, kv_cache_tokens),
        latency_limit=jnp.asarray(limit, float),
        penalty_weight=jnp.asarray(penalty_weight, float),
        penalty_prefill=jnp.asarray([k1 for k1, _ in penalty], float),
        penalty_context=jnp.asarray([k2 for _, k2 in penalty], float),
        token_scale=jnp.asarray(max(own.token_scale for own in profiles), float),
    )


def make(environment_id: str, **static: Any) -> tuple[RoutingEnvironment, EnvParams]:
    """The registered environment of this name, "paper-3" or "paper-6", and its default parameters.

    `static` sets fields of `RoutingEnvironment` (slots, episode_length, observation, penalty, metrics, queue_nodes).
    Raises `UserError` for an unknown name, with the nearest.
    """
    experts = SCENARIOS[known(environment_id, SCENARIOS, "environment id")]
    for key in static:
        known(key, RoutingEnvironment.__dataclass_fields__.keys() - {"num_experts"}, "environment option")
    return RoutingEnvironment(num_experts=len(experts), **static), make_params(experts)
