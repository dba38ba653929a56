"""The network of the paper's Baseline RL: perceptrons on the observation as one vector, without a graph."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.agent.router_network import NEAR_ZERO, ActorCritic, Dense
from jaxroute.environment.observation import RoutingGraph, flatten


class FlatEmbedding(flax.struct.PyTreeNode):
    """The observation, features first and the B graphs last. All traced."""

    features: jax.Array  # float32 [F, 1, B]
    action_mask: jax.Array  # bool [..., N + 1], as observed; B is the product of its other axes


class FlatNetwork(ActorCritic):
    """Policy logits and twin Q values of every action, from all features side by side: for one number of experts.

    The same interface as `RouterNetwork`; nothing is shared between actor and critics.
    """

    mlp: tuple[int, ...] = (64, 64)

    def setup(self):
        """The actor and the pair of critics, each a perceptron of its own on the whole vector."""
        self.actor = FlatValues(self.mlp, copies=1)
        self.critic = FlatValues(self.mlp, copies=2)

    def encode(self, obs: RoutingGraph) -> FlatEmbedding:
        """The observation itself, as one vector: there are no weights before the heads."""
        features = flatten(obs)
        return FlatEmbedding(features.reshape(-1, features.shape[-1]).T[:, None], obs.action_mask)

    def critics(self, embedding: FlatEmbedding) -> jax.Array:
        """As `ActorCritic.critics`."""
        return self.critic(embedding)


class FlatValues(nn.Module):
    """One value for each action, float32 [..., copies, N + 1], from `copies` independent perceptrons.

    The last layer starts near zero: values near 0 and a policy near uniform.
    """

    mlp: tuple[int, ...]
    copies: int

    @nn.compact
    def __call__(self, embedding: FlatEmbedding) -> jax.Array:
        """Every copy reads all of the features."""
        *batch, actions = embedding.action_mask.shape
        x = [embedding.features] * self.copies
        for width in self.mlp:
            x = [nn.relu(one) for one in Dense(width, self.copies)(x)]
        values = jnp.concatenate(Dense(actions, self.copies, kernel_init=NEAR_ZERO)(x), axis=1)  # [A, copies, B]
        return values.T.reshape(*batch, self.copies, actions)
