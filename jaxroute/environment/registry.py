"""Named environments: `jaxroute.make("paper-3")` gives an environment and its parameters, `register` adds one's own.

`scenarios` registers those that come with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, require_known
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.profiles import EXPERTS, cluster, engine_profiles
from jaxroute.workload.arrivals import Arrivals, PoissonArrivals
from jaxroute.workload.requests import FrozenRequests
from jaxroute.workload.workload import Workload

PAPER_PENALTY = {"chatglm-6b": (6.8e-5, 2.5e-5)}
"""k1, k2 of the paper's penalty by expert, s (its first author's constants); `PAPER_PENALTY_DEFAULT` for the others."""

PAPER_PENALTY_DEFAULT = (7.2e-5, 2.5e-5)

SCENARIOS = {
    "paper-3": tuple(EXPERTS)[:3],
    "paper-6": tuple(EXPERTS)[:6],
}
"""Names of the experts by registered environment: those of the paper here, `scenarios` adds its own."""


def make_params(
    experts: Sequence[str],
    profile: str | Sequence[str] = "paper",
    workload: Workload | None = None,
    latency_limit: float | None = None,
    penalty_weight: float = 1.0,
    kv_cache_tokens: int | Sequence[int] | None = None,
    discipline: str = "vllm_v1",
    max_model_len: int | None = None,
) -> EnvParams:
    """Parameters of a cluster of these experts; by default as the frozen scenario, at 3 requests/s (section 7).

    `profile` and `kv_cache_tokens` are one for all or one for each expert; `latency_limit` is in s per output token.
    `max_model_len` in tokens. None takes the profile's own. `discipline` is every engine's: vllm_v1, vllm_v0 or orca.
    Raises `UserError`.
    """
    profiles = engine_profiles(experts, profile)
    if workload is None:
        workload = frozen_workload(experts, PoissonArrivals.create(3.0))
    if workload.num_experts != len(experts):
        raise UserError(f"the workload is for {workload.num_experts} experts, the cluster has {len(experts)}")
    limit = max(own.latency_limit for own in profiles) if latency_limit is None else latency_limit
    return params_of(
        workload,
        cluster(experts, profiles, kv_cache_tokens, discipline, max_model_len),
        limit,
        max(own.token_scale for own in profiles),
        penalty_weight,
        [PAPER_PENALTY.get(expert, PAPER_PENALTY_DEFAULT) for expert in experts],
    )


def frozen_workload(experts: Sequence[str], arrivals: Arrivals) -> Workload:
    """Requests of the frozen generator for these experts, at these times."""
    scores = [EXPERTS[require_known(expert, EXPERTS, "expert")].mean_score for expert in experts]
    return Workload.create(arrivals, FrozenRequests.create(scores))


def params_of(
    workload: Workload,
    engines: EngineParams,
    latency_limit: float,
    token_scale: float,
    penalty_weight: float = 1.0,
    penalty: Sequence[tuple[float, float]] | None = None,
) -> EnvParams:
    """Parameters of engines (each field [N]) of one's own; `penalty` is k1, k2 of each. Raises `UserError`."""
    limit, penalty = latency_limit, penalty or [PAPER_PENALTY_DEFAULT] * workload.num_experts
    if not 0 < limit < float("inf"):
        raise UserError(f"latency_limit must be above 0 (seconds per output token), not {limit}")
    return EnvParams(
        workload=workload,
        engines=engines,
        latency_limit=jnp.asarray(limit, float),
        penalty_weight=jnp.asarray(penalty_weight, float),
        penalty_prefill=jnp.asarray([k1 for k1, _ in penalty], float),
        penalty_context=jnp.asarray([k2 for _, k2 in penalty], float),
        token_scale=jnp.asarray(token_scale, float),
    )


Factory = Callable[..., tuple[Any, Any]]
"""(**options) -> (environment, its default parameters)."""


class _Registered(NamedTuple):
    factory: Factory
    description: str


_ENVIRONMENTS: dict[str, _Registered] = {}


def register(name: str, factory: Factory, description: str) -> None:
    """Makes `make(name, **options)` return `factory(**options)`, an environment and its default parameters.

    `description` is a line on what the environment teaches. Raises `UserError` for a name that is taken.
    """
    if name in _ENVIRONMENTS:
        raise UserError(f"an environment '{name}' is registered already; choose another name")
    if not description.strip() or "\n" in description:
        raise UserError(f"environment '{name}' needs a description of one line")
    _ENVIRONMENTS[name] = _Registered(factory, description)


def environments() -> dict[str, str]:
    """Name -> description of each registered environment."""
    return {name: registered.description for name, registered in _ENVIRONMENTS.items()}


def make(environment_id: str, **options: Any) -> tuple[Any, Any]:
    """The registered environment of this name (see `environments`), and its default parameters.

    `options` set fields of `RoutingEnvironment` (slots, episode_length, obs, penalty, metrics, queue_nodes, drop). All
    but `cluster` also take `make_params`'s experts, profile, kv_cache_tokens, discipline and max_model_len; `azure` and
    `cluster` need the `path` of a file.
    Raises `UserError` for an unknown name or option, with the nearest.
    """
    return _ENVIRONMENTS[require_known(environment_id, _ENVIRONMENTS, "environment id")].factory(**options)


def environment_of(num_experts: int, options: dict[str, Any], **defaults: Any) -> RoutingEnvironment:
    """The environment with these options in place of the defaults; `UserError` for an unknown one."""
    for key in options:
        require_known(key, RoutingEnvironment.__dataclass_fields__.keys() - {"num_experts"}, "environment option")
    return RoutingEnvironment(num_experts=num_experts, **{**defaults, **options})
