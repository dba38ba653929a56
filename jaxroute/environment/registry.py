"""Named environments: `make("paper-3")` returns an environment and its parameters; `register` adds further ones.

`scenarios` registers the environments of the package.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, require_known
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.profiles import EXPERTS, cluster, engine_profiles
from jaxroute.workload.arrivals import Arrivals, PoissonArrivals
from jaxroute.workload.requests import FrozenRequests, QuantileRequests
from jaxroute.workload.trace_lengths import Lengths
from jaxroute.workload.workload import Workload

PAPER_PENALTY = {"chatglm-6b": (6.8e-5, 2.5e-5)}
"""k1, k2 of the paper's penalty by expert, s (constants of its first author); others: `PAPER_PENALTY_DEFAULT`."""

PAPER_PENALTY_DEFAULT = (7.2e-5, 2.5e-5)

SCENARIOS = {
    "paper-3": tuple(EXPERTS)[:3],
    "paper-6": tuple(EXPERTS)[:6],
}
"""Names of the experts of each registered environment. `scenarios` adds entries."""


def make_params(
    experts: Sequence[str],
    profile: str | Sequence[str] = "paper",
    workload: Workload | None = None,
    latency_limit: float | None = None,
    penalty_weight: float = 1.0,
    kv_cache_tokens: int | Sequence[int] | None = None,
    discipline: str = "vllm_v1",
    max_model_len: int | None = None,
    engine: str | None = None,
) -> EnvParams:
    """Parameters of a cluster of these experts. The defaults are the frozen scenario's, with 3 requests/s (section 7).

    `profile` and `kv_cache_tokens` are one value for all experts or one for each. `latency_limit` is in s per output
    token, `max_model_len` in tokens; None selects the profile's value. `discipline` is that of every engine: vllm_v1,
    vllm_v0 or orca. Instead of it, `engine` names a version of vLLM with its defaults: vllm-0.33, vllm-0.19 or
    vllm-0.6 (`simulator.presets`). Raises `UserError`.
    """
    profiles = engine_profiles(experts, profile)
    if workload is None:
        workload = frozen_workload(experts, PoissonArrivals.create(3.0))
    if workload.num_experts != len(experts):
        raise UserError(f"the workload is for {workload.num_experts} experts, the cluster has {len(experts)}")
    limit = max(own.latency_limit for own in profiles) if latency_limit is None else latency_limit
    return params_of(
        workload,
        cluster(experts, profiles, kv_cache_tokens, discipline, max_model_len, engine),
        limit,
        max(own.token_scale for own in profiles),
        penalty_weight,
        [PAPER_PENALTY.get(expert, PAPER_PENALTY_DEFAULT) for expert in experts],
    )


def frozen_workload(experts: Sequence[str], arrivals: Arrivals, lengths: Lengths | None = None) -> Workload:
    """Requests of the frozen generator for these experts, with these arrivals, and other `lengths` if given."""
    scores = [EXPERTS[require_known(expert, EXPERTS, "expert")].mean_score for expert in experts]
    requests = FrozenRequests.create(scores) if lengths is None else QuantileRequests.create(lengths, scores)
    return Workload.create(arrivals, requests)


def params_of(
    workload: Workload,
    engines: EngineParams,
    latency_limit: float,
    token_scale: float,
    penalty_weight: float = 1.0,
    penalty: Sequence[tuple[float, float]] | None = None,
) -> EnvParams:
    """Parameters for given engines (each field [N]); `penalty` has k1, k2 of each. Raises `UserError`."""
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
    """Registers a factory: `make(name, **options)` returns `factory(**options)`, an environment and its parameters.

    `description` is one line on the purpose of the environment. Raises `UserError` if the name is taken.
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
    environments except `cluster` also accept the experts, profile, kv_cache_tokens, discipline, engine and
    max_model_len of `make_params`. `azure` and `cluster` need the `path` of a file.
    Raises `UserError` for an unknown name or option; the message suggests the most similar ones.
    """
    return _ENVIRONMENTS[require_known(environment_id, _ENVIRONMENTS, "environment id")].factory(**options)


def environment_of(num_experts: int, options: dict[str, Any], **defaults: Any) -> RoutingEnvironment:
    """The environment with these options instead of the defaults; `UserError` for an unknown option."""
    for key in options:
        require_known(key, RoutingEnvironment.__dataclass_fields__.keys() - {"num_experts"}, "environment option")
    return RoutingEnvironment(num_experts=num_experts, **{**defaults, **options})
