"""The paper's heuristic routers, and a random one, as pure functions for one environment.

Each is `router(observation, state, params, key) -> action int32 []`. None ever drops a request: it chooses among the
experts that the action mask allows, or among all where it allows none, and the environment counts the rejection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import action_mask

Router = Callable[[Any, Any, Any, jax.Array], jax.Array]


def heuristic_routers(env: RoutingEnvironment) -> dict[str, Router]:
    """Name -> router of the environment `env`: "round-robin", "shortest-queue", "bert-router" and "random"."""

    def round_robin(observation: Any, state: Any, params: Any, key: jax.Array) -> jax.Array:
        """Each decision's expert follows the one before it; a barred expert's turn passes to the next allowed one."""
        turns_away = (jnp.arange(env.num_experts) - state.step) % env.num_experts
        return _smallest(turns_away, action_mask(params, state, env.slots))

    def shortest_queue(observation: Any, state: Any, params: Any, key: jax.Array) -> jax.Array:
        """The expert with the fewest requests, running and waiting; ties go to the lowest index."""
        return _smallest(env.queue_lengths(state), action_mask(params, state, env.slots))

    def bert_router(observation: Any, state: Any, params: Any, key: jax.Array) -> jax.Array:
        """The expert with the highest predicted score, whatever its load."""
        return _smallest(-state.request.predicted_score, action_mask(params, state, env.slots))

    def random(observation: Any, state: Any, params: Any, key: jax.Array) -> jax.Array:
        """Any expert, all alike."""
        return _smallest(jax.random.uniform(key, (env.num_experts,)), action_mask(params, state, env.slots))

    return {
        "round-robin": round_robin,
        "shortest-queue": shortest_queue,
        "bert-router": bert_router,
        "random": random,
    }


def _smallest(cost: jax.Array, mask: jax.Array) -> jax.Array:
    """int32 []: the expert of the smallest `cost` [N], the first of equals; among those in `mask` [N + 1], if any."""
    allowed = mask[:-1] | ~mask[:-1].any()
    return jnp.argmin(jnp.where(allowed, cost.astype(jnp.float32), jnp.inf)).astype(jnp.int32)
