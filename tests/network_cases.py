"""Random observations and weights for the tests of the graph and the network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.observation import FullGraphObservation, GraphObservation


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


def with_whole_queues(obs: GraphObservation) -> FullGraphObservation:
    """The same requests in slots that both queues share, running ones first, and slots to spare."""
    slots = obs.running_mask.shape[-1]
    queued = jnp.concatenate([obs.running, obs.waiting], axis=-2)
    running = jnp.pad(obs.running_mask, [*[(0, 0)] * (obs.running_mask.ndim - 1), (0, slots)])
    waiting = jnp.pad(obs.waiting_mask, [*[(0, 0)] * (obs.waiting_mask.ndim - 1), (slots, 0)])
    order = jnp.argsort(~(running | waiting), axis=-1, stable=True)
    running, waiting = (jnp.take_along_axis(mask, order, axis=-1) for mask in (running, waiting))
    queued = jnp.take_along_axis(queued, order[..., None], axis=-2)
    return FullGraphObservation(obs.arrived, obs.expert, queued, running, waiting, obs.action_mask)


def with_empty_queues(obs: GraphObservation) -> GraphObservation:
    return obs.replace(running_mask=jnp.zeros_like(obs.running_mask), waiting_mask=jnp.zeros_like(obs.waiting_mask))


def random_params(network: nn.Module, obs: GraphObservation):
    """Weights of which none is zero, so that a bias added where it must not be is seen."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), obs)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32), shapes)
