"""Random observations and weights for the tests of the graph and the network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.observation import GraphObservation


def random_observation(seed: int, *batch: int, num_experts: int = 3, slots: int = 4) -> GraphObservation:
    """Random features, queues of random length (some empty) and all actions allowed; `batch` are leading axes."""
    rng = np.random.default_rng(seed)

    def features(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*batch, *shape)), jnp.float32)

    def queue_mask() -> jax.Array:
        return jnp.asarray(np.arange(slots) < rng.integers(0, slots + 1, (*batch, num_experts, 1)))

    return GraphObservation(
        arrived=features(1),
        expert=features(num_experts, 6),
        running=features(num_experts, slots, 5),
        waiting=features(num_experts, slots, 5),
        running_mask=queue_mask(),
        waiting_mask=queue_mask(),
        action_mask=jnp.ones((*batch, num_experts + 1), bool),
    )


def with_empty_queues(obs: GraphObservation) -> GraphObservation:
    return obs.replace(running_mask=jnp.zeros_like(obs.running_mask), waiting_mask=jnp.zeros_like(obs.waiting_mask))


def random_params(network: nn.Module, obs: GraphObservation):
    """Weights of which none is zero, so that a bias added where it must not be is seen."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), obs)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32), shapes)
