"""One decision as one compiled program: facts of the ledger to state, observation and action."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams
from jaxroute.routers.choice import Router, predicted_latency
from jaxroute.serving.estimate import environment_state
from jaxroute.serving.ledger import Facts, Ledger
from jaxroute.workload.request import Request


class Asked(NamedTuple):
    """What is known of an arriving request, for N experts."""

    prompt_tokens: int  # at least 1
    predicted_tokens: np.ndarray  # int32 [N], output tokens, at least 1
    predicted_score: np.ndarray  # float32 [N]
    latency_limit: float  # s per output token


class Decision(NamedTuple):
    """Where a request goes."""

    expert: int | None  # None: dropped
    retry_after: int  # s, when a dropped request might be served in time


class Decider:
    """Decides by a router. Every decision is the same program, whatever the queues, the limit and the engines are."""

    def __init__(self, env: RoutingEnvironment, router: Router, params: EnvParams, seed: int = 0):
        """`params` may be replaced at any time by others of the same shapes."""
        self.env, self.router, self.params = env, router, params.replace(workload=None)  # pyright: ignore
        self._key = jax.random.key(seed)

    def __call__(self, ledger: Ledger, now: float, asked: Asked, up: np.ndarray) -> Decision:
        """The decision at `now` among the experts that are `up`, bool [N], and have a free slot in the ledger."""
        request = Request(
            prompt_tokens=np.int32(asked.prompt_tokens),  # pyright: ignore
            output_tokens=asked.predicted_tokens,  # pyright: ignore
            score=asked.predicted_score,  # pyright: ignore
            predicted_output_tokens=asked.predicted_tokens,  # pyright: ignore
            predicted_score=asked.predicted_score,  # pyright: ignore
        )
        allowed = up & (ledger.count < ledger.slots)
        limit = np.float32(asked.latency_limit)
        facts = ledger.facts(now)
        action, late = _decide(self.env, self.router, self.params, facts, request, limit, allowed, self._key)
        chosen = int(action)
        seconds = float(late)
        retry = math.ceil(seconds) if math.isfinite(seconds) else 1
        return Decision(chosen if chosen < self.env.num_experts else None, max(retry, 1))


@functools.partial(jax.jit, static_argnums=0)
def _decide(
    env: RoutingEnvironment,
    router: Any,
    params: EnvParams,
    facts: Facts,
    request: Request,
    limit: jax.Array,
    allowed: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The action int32 [], 0..N, and float [], s that the request would be late at the best of the allowed experts."""
    request = jax.tree.map(jnp.asarray, request)
    state = environment_state(facts, request, params.engines)
    # An expert that is not allowed has no room for any prompt, which is what the action mask of every router asks.
    longest = jnp.where(allowed, params.engines.max_model_len, 0)
    engines = params.engines.replace(max_model_len=longest)
    params = params.replace(latency_limit=limit, ttft_limit=None, tpot_limit=None, engines=engines)
    action = router(jax.random.fold_in(key, state.step), env.observe(state, params), state, params)
    mask = action_mask(state, params, env.slots)
    # A rule that finds no expert allowed chooses among all.
    action = jnp.where(mask[jnp.clip(action, 0, env.num_experts)], action, env.num_experts)
    late = (predicted_latency(state, params) - limit) * request.predicted_output_tokens
    return action, jnp.min(jnp.where(mask[:-1], late, jnp.inf))
