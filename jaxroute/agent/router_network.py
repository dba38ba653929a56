"""The soft actor-critic router's network, for any number of experts: a HAN encoder, a policy head and twin critics."""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.agent.han import HAN
from jaxroute.agent.han_dense import graphs_last, project
from jaxroute.environment.observation import RoutingGraph

NEAR_ZERO = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal", batch_axis=0)
"""Initializer of a head's last layer: the initial values are near 0, and the initial policy is near uniform."""


class Embedding(flax.struct.PyTreeNode):
    """The inputs of the heads, with features on the first axis and the B graphs on the last; N experts, Fe raw expert
    features. All traced."""

    arrived: jax.Array  # float32 [hidden, B]
    expert: jax.Array  # float32 [hidden, N, B]
    expert_features: jax.Array  # float32 [Fe, N, B], as observed
    action_mask: jax.Array  # bool [..., N + 1], as observed; B is the product of its other axes

    @property
    def pooled(self) -> jax.Array:
        """float32 [2 hidden, 1, B]: mean and maximum of the experts' embeddings."""
        return jnp.concatenate([self.expert.mean(1, keepdims=True), self.expert.max(1, keepdims=True)])

    def by_action(self, values: jax.Array) -> jax.Array:
        """`values` [copies, actions, B] as [..., copies, actions], with the observations' batch axes."""
        return jnp.moveaxis(values, -1, 0).reshape(*self.action_mask.shape[:-1], *values.shape[:-1])


class ActorCritic(nn.Module):
    """The interface that the learner uses. `encode` of a subclass returns an embedding with `action_mask`, and its
    submodule `actor` maps the embedding to logits [..., 1, N + 1]."""

    def __call__(self, obs: RoutingGraph) -> tuple[jax.Array, jax.Array]:
        """The policy's logits float32 [..., N + 1] and the critics' values float32 [..., 2, N + 1]."""
        embedding = self.encode(obs)
        return self.policy(embedding), self.critics(embedding)

    def encode(self, obs: RoutingGraph) -> Any:
        """The embedding that the heads read."""
        raise NotImplementedError

    def policy(self, embedding: Any) -> jax.Array:
        """Logits float32 [..., N + 1]. A forbidden action has finfo.min, so its probability is exactly 0."""
        logits = self.actor(embedding).squeeze(-2)
        return jnp.where(embedding.action_mask, logits, jnp.finfo(logits.dtype).min)

    def critics(self, embedding: Any) -> jax.Array:
        """Q values float32 [..., 2, N + 1] of the two critics, including those of forbidden actions."""
        raise NotImplementedError


class RouterNetwork(ActorCritic):
    """Policy logits and twin Q values of every action: N experts, then drop.

    Every head uses the same weights for all experts. One set of parameters therefore works with any N, and permuting
    the experts permutes the outputs. Observations may have any leading batch axes.
    """

    hidden: int = 64
    heads: int = 8
    layers: int = 2
    residual: bool = True
    mlp: tuple[int, ...] = (64, 64)
    encoder_path: Literal["dense", "jraph"] = "dense"  # two ways to compute the same function (see `HAN`)

    def setup(self):
        """The encoder, the actor, and the two critics, which consist of action values and a state value."""
        self.encoder = HAN(self.hidden, self.heads, self.layers, self.residual)
        self.actor = ActionValues(self.mlp, copies=1)
        self.critic = ActionValues(self.mlp, copies=2)
        self.state_critic = MLP(self.mlp, copies=2)

    def encode(self, obs: RoutingGraph) -> Embedding:
        """The encoder's last states of the arrived node and the expert nodes, and the experts' raw features."""
        if self.encoder_path == "jraph":
            embedded = self.encoder.embed_by_graph(obs)
            return Embedding(embedded[:, 0].T, embedded[:, 1:].T, graphs_last(obs.expert, 2), obs.action_mask)
        raw, *_, last = self.encoder.states(obs)
        return Embedding(last.arrived, last.expert, raw.expert, obs.action_mask)

    def critics(self, embedding: Embedding) -> jax.Array:
        """As `ActorCritic.critics`: a value of the state plus the advantage of each action over the mean action.

        These are dueling critics (Wang et al. 2016, arXiv 1511.06581). Most of a value is the QoS of requests that are
        open whatever the action is.
        """
        advantage = self.critic(embedding)
        value = embedding.by_action(self.state_critic(embedding.pooled, embedding.arrived[:, None]))
        return value + advantage - advantage.mean(axis=-1, keepdims=True)


class ActionValues(nn.Module):
    """One value for each action, float32 [..., copies, N + 1], from `copies` independent sets of weights.

    A value is a linear function of the expert's features, which starts at 0 (see `with_linear_policy`), plus that of a
    perceptron.
    """

    mlp: tuple[int, ...]
    copies: int

    def setup(self):
        """The experts share one perceptron; dropping has its own."""
        self.linear = Linear(self.copies)
        self.of_expert = MLP(self.mlp, self.copies)
        self.of_drop = MLP(self.mlp, self.copies)

    def __call__(self, embedding: Embedding) -> jax.Array:
        """Computes an expert's value from its own embedding and features, and dropping's from the pooled embedding."""
        expert, arrived = embedding.expert, embedding.arrived[:, None]
        own = jnp.concatenate([expert, embedding.expert_features])
        values = jnp.concatenate([self.of_expert(own, arrived), self.of_drop(embedding.pooled, arrived)], axis=1)
        return embedding.by_action(values + self.linear(embedding.expert_features))


class Linear(nn.Module):
    """`weight` . features of each expert, and a constant for dropping: float32 [copies, N + 1, B]. All start at 0."""

    copies: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """`features` are float32 [Fe, N, B]."""
        zeros = nn.initializers.zeros_init()
        weight = self.param("weight", zeros, (self.copies, len(features)))
        drop = self.param("drop", zeros, (self.copies,))
        of_experts = project(weight.T, features)
        of_drop = jnp.broadcast_to(drop[:, None, None], (self.copies, 1, features.shape[-1]))
        return jnp.concatenate([of_experts, of_drop], axis=1)


def with_linear_policy(variables: Any, weights: jax.Array) -> Any:
    """`variables` of a `RouterNetwork` whose policy starts as a linear one: logits `weights[:-1]` . features of each
    expert, and `weights[-1]` for dropping; `weights` are float32 [Fe + 1]. The perceptron adds almost 0 at first.
    """
    linear = {"weight": weights[None, :-1], "drop": weights[-1:]}
    params = variables["params"]
    return {**variables, "params": {**params, "actor": {**params["actor"], "linear": linear}}}


class MLP(nn.Module):
    """Perceptrons that map `own` [F, rows, B], concatenated with `shared` [G, 1, B], to float32 [copies, rows, B].

    The first layer is written as a sum, so that the part that all rows share is computed once. The last layer starts
    near zero, so that initial values are near 0 and the initial policy is near uniform.
    """

    widths: tuple[int, ...]
    copies: int

    @nn.compact
    def __call__(self, own: jax.Array, shared: jax.Array) -> jax.Array:
        """Every row of `own` is concatenated with the single row of `shared`."""
        first, *others = self.widths
        of_own = Dense(first, self.copies)([own] * self.copies)
        of_shared = Dense(first, self.copies, use_bias=False)([shared] * self.copies)
        x = [nn.relu(a + b) for a, b in zip(of_own, of_shared, strict=True)]
        for width in others:
            x = [nn.relu(one) for one in Dense(width, self.copies)(x)]
        return jnp.concatenate(Dense(1, self.copies, kernel_init=NEAR_ZERO)(x))


class Dense(nn.Module):
    """Affine maps of features, one for each copy: [F, ...] to [width, ...].

    The copies are computed one by one and not as a batch, which is twice as fast on a CPU.
    """

    width: int
    copies: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(batch_axis=0)

    @nn.compact
    def __call__(self, inputs: list[jax.Array]) -> list[jax.Array]:
        """Maps the input of each copy, float32 [F, rows, B], to its output, float32 [width, rows, B]."""
        kernels = self.param("kernel", self.kernel_init, (self.copies, len(inputs[0]), self.width))
        outputs = [project(kernel, x) for kernel, x in zip(kernels, inputs, strict=True)]
        if not self.use_bias:
            return outputs
        biases = self.param("bias", nn.initializers.zeros_init(), (self.copies, self.width))
        return [x + bias[:, None, None] for x, bias in zip(outputs, biases, strict=True)]
