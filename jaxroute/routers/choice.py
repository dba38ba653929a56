"""What routers have in common: their type, the experts to choose among, and the choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams, EnvState

Router = Callable[[Any, EnvState, EnvParams, jax.Array], jax.Array]
"""(observation, state, params, key) -> action int32 []."""


def candidates(env: RoutingEnvironment, params: EnvParams, state: EnvState) -> jax.Array:
    """bool [N]: the experts that the action mask allows, or all where it allows none."""
    allowed = action_mask(params, state, env.slots)[:-1]
    return allowed | ~allowed.any()


def smallest(cost: jax.Array, among: jax.Array) -> jax.Array:
    """int32 []: the expert of the smallest `cost` [N] among those in `among` (bool [N]), the first of equals."""
    return jnp.argmin(jnp.where(among, cost.astype(float), jnp.inf)).astype(jnp.int32)


def smallest_at_random(cost: jax.Array, among: jax.Array, key: jax.Array) -> jax.Array:
    """As `smallest`, any of equals, all alike."""
    cost = jnp.where(among, cost.astype(float), jnp.inf)
    return smallest(jax.random.uniform(key, cost.shape), among & (cost == cost.min()))
