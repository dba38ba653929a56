"""The network of the paper's Baseline RL: perceptrons on the observation as one vector, without a graph."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.agent.router_network import NEAR_ZERO, ActorCritic, Dense
from jaxroute.environment.observation import RoutingGraph, flatten


class FlatEmbedding(flax.struct.PyTreeNode):
    """The observation, with features on the first axis and the B graphs on the last. All traced."""

    features: jax.Array  # float32 [F, 1, B]
    action_mask: jax.Array  # bool [..., N + 1], as observed; B is the product of its other axes


class FlatNetwork(ActorCritic):
    """Policy logits and twin Q values of every action, computed from one vector of all features.

    The weights fit one number of experts. The interface is that of `RouterNetwork`; actor and critics share nothing.
    """

    mlp: tuple[int, ...] = (64, 64)

    def setup(self):
        """The actor and the two critics, each with its own perceptron on the whole vector."""
        self.actor = FlatValues(self.mlp, copies=1)
        self.critic = FlatValues(self.mlp, copies=2)

    def encode(self, obs: RoutingGraph) -> FlatEmbedding:
        """The observation itself as one vector, because there is no encoder before the heads."""
        features = flatten(obs)
        return FlatEmbedding(features.reshape(-1, features.shape[-1]).T[:, None], obs.action_mask)

    def critics(self, embedding: FlatEmbedding) -> jax.Array:
        """As `ActorCritic.critics`."""
        return self.critic(embedding)


class FlatValues(nn.Module):
    """One value for each action, float32 [..., copies, N + 1], from `copies` independent perceptrons.

    The last layer starts near zero, so that initial values are near 0 and the initial policy is near uniform.
    """

    mlp: tuple[int, ...]
    copies: int

    @nn.compact
    def __call__(self, embedding: FlatEmbedding) -> jax.Array:
        """Every copy reads all features."""
        *batch, actions = embedding.action_mask.shape
        x = [embedding.features] * self.copies
        for width in self.mlp:
            x = [nn.relu(one) for one in Dense(width, self.copies)(x)]
        values = jnp.concatenate(Dense(actions, self.copies, kernel_init=NEAR_ZERO)(x), axis=1)  # [A, copies, B]
        return values.T.reshape(*batch, self.copies, actions)
