"""Common parts of routers: their type, the experts to choose among, and the choice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.batching import in_own_modes
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams, EnvState

Router = Callable[[jax.Array, Any, EnvState, EnvParams], jax.Array]
"""(key, observation, state, params) -> action int32 []. Any such function is a router."""


class RuleRouter(struct.PyTreeNode):
    """A rule for an environment. Routers with one rule and equal environments are equal and share compiled programs."""

    rule: Callable[..., jax.Array] = struct.field(pytree_node=False)  # (env, key, observation, state, params, **own)
    env: RoutingEnvironment = struct.field(pytree_node=False)
    parameters: dict[str, Any]  # parameters of the rule, by name, traced

    @in_own_modes
    def __call__(self, key: jax.Array, observation: Any, state: EnvState, params: EnvParams) -> jax.Array:
        """The action, int32 []."""
        return self.rule(self.env, key, observation, state, params, **self.parameters)

    def __hash__(self) -> int:
        # `jax.jit(router)` hashes it. The numbers are left out, as arrays have no hash.
        return hash((self.rule, self.env, *self.parameters))


def candidates(env: RoutingEnvironment, state: EnvState, params: EnvParams) -> jax.Array:
    """bool [N]: the experts that the action mask allows, or all experts if it allows none."""
    allowed = action_mask(state, params, env.slots)[:-1]
    return allowed | ~allowed.any()


def smallest(cost: jax.Array, among: jax.Array) -> jax.Array:
    """int32 []: the expert with the smallest `cost` [N] in `among` (bool [N]); ties go to the lowest index."""
    return jnp.argmin(jnp.where(among, cost.astype(float), jnp.inf)).astype(jnp.int32)


def smallest_at_random(cost: jax.Array, among: jax.Array, key: jax.Array) -> jax.Array:
    """Like `smallest`, but ties are broken uniformly at random."""
    cost = jnp.where(among, cost.astype(float), jnp.inf)
    return smallest(jax.random.uniform(key, cost.shape), among & (cost == cost.min()))
