"""The network of the soft actor-critic router: one HAN encoder, a policy head and twin critics, for any number of
experts."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.environment.observation import GraphObservation
from jaxroute.network.han import HAN


class Embedding(flax.struct.PyTreeNode):
    """What the heads read. All traced; N experts, Fe raw expert features."""

    arrived: jax.Array  # float32 [..., hidden]
    expert: jax.Array  # float32 [..., N, hidden]
    expert_features: jax.Array  # float32 [..., N, Fe], as observed
    action_mask: jax.Array  # bool [..., N + 1], as observed


class RouterNetwork(nn.Module):
    """Policy logits and twin Q values of every action: N experts, then drop.

    Every head gives each expert a value from the same weights, so one set of parameters routes over any N, and
    permuting the experts permutes the outputs. Observations may have any leading batch axes.
    """

    hidden: int = 64
    heads: int = 8
    layers: int = 2
    residual: bool = True
    mlp: tuple[int, ...] = (64, 64)

    def setup(self):
        self.encoder = HAN(self.hidden, self.heads, self.layers, self.residual)
        self.actor = ActionValues(self.mlp, copies=1)
        self.critic = ActionValues(self.mlp, copies=2)

    def __call__(self, obs: GraphObservation) -> tuple[jax.Array, jax.Array]:
        """The policy's logits float32 [..., N + 1] and the critics' values float32 [..., 2, N + 1]."""
        embedding = self.encode(obs)
        return self.policy(embedding), self.critics(embedding)

    def encode(self, obs: GraphObservation) -> Embedding:
        nodes = self.encoder(obs)
        return Embedding(
            arrived=nodes["arrived"],
            expert=nodes["expert"],
            expert_features=obs.expert,
            action_mask=obs.action_mask,
        )

    def policy(self, embedding: Embedding) -> jax.Array:
        """Logits float32 [..., N + 1]; finfo.min where an action is not allowed: its probability is exactly 0."""
        logits = self.actor(embedding).squeeze(-2)
        return jnp.where(embedding.action_mask, logits, jnp.finfo(logits.dtype).min)

    def critics(self, embedding: Embedding) -> jax.Array:
        """Q values float32 [..., 2, N + 1] of the two critics, of actions that are not allowed too."""
        return self.critic(embedding)


class ActionValues(nn.Module):
    """One value for each action, float32 [..., copies, N + 1], from `copies` independent sets of weights."""

    mlp: tuple[int, ...]
    copies: int

    def setup(self):
        batched = nn.vmap(
            MLP,
            in_axes=None,  # pyright: ignore[reportArgumentType] (every copy reads the same input)
            out_axes=-2,
            axis_size=self.copies,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        self.of_expert = batched(self.mlp)
        self.of_drop = batched(self.mlp)

    def __call__(self, embedding: Embedding) -> jax.Array:
        own = jnp.concatenate([embedding.expert, embedding.expert_features], axis=-1)
        pooled = jnp.concatenate([embedding.expert.mean(-2), embedding.expert.max(-2)], axis=-1)
        arrived = embedding.arrived[..., None, :]
        values = self.of_expert(own, arrived), self.of_drop(pooled[..., None, :], arrived)
        return jnp.concatenate(values, axis=-1)


class MLP(nn.Module):
    """A perceptron from `own` [..., rows, F] and `shared` [..., 1, G], joined, to one number: float32 [..., rows].

    The first layer is written as a sum, so that the part of it that all rows share is computed once. The last layer
    starts near zero: values near 0 and a policy near uniform.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, own: jax.Array, shared: jax.Array) -> jax.Array:
        first, *others = self.widths
        x = nn.relu(nn.Dense(first)(own) + nn.Dense(first, use_bias=False)(shared))
        for width in others:
            x = nn.relu(nn.Dense(width)(x))
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
        return nn.Dense(1, kernel_init=small)(x).squeeze(-1)
