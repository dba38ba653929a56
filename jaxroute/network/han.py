"""Heterogeneous graph attention network (Wang et al., 2019) on the routing graph: one set of weights, two equal paths.

A layer, as PyTorch Geometric's HANConv: every node type is projected; for each edge type a node attends over its
neighbours (several heads, LeakyReLU 0.2, softmax, ReLU after the sum, zeros without neighbours); semantic attention
then mixes the edge types that reach a node. `residual` adds the node's own projection, without which an expert's own
features never become part of the arrived node's message in two layers (simulation.md section 5); `residual=False` is
the paper's network.

`HAN.__call__` takes a `GraphObservation` and is the fast path: dense arrays with masks, any leading batch axes.
`HAN.on_graph` takes a `jraph.GraphsTuple`, batched and padded as one likes, and is the readable one. Tests hold them
equal.
"""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.environment.observation import GraphObservation
from jaxroute.graph.hetero import EDGE_TYPES, LEAKY_SLOPE, NODE_TYPES, GraphsTuple, attend, graph_mean, node_type


class LayerWeights(flax.struct.PyTreeNode):
    """The weights of one layer: F features in, hidden = H heads x D out. All traced."""

    kernel: dict[str, jax.Array]  # per node type, float32 [F of the type, hidden]
    bias: dict[str, jax.Array]  # per node type, float32 [hidden]
    source: jax.Array  # float32 [6, H, D]: attention vectors of EDGE_TYPES, for the source
    destination: jax.Array  # float32 [6, H, D]: the same for the destination
    semantic_kernel: jax.Array  # float32 [hidden, hidden], shared by the node types
    semantic_bias: jax.Array  # float32 [hidden]
    semantic_query: jax.Array  # float32 [hidden]


class HANLayer(nn.Module):
    """Declares the weights of one layer, for node features of the given widths (in the order of NODE_TYPES)."""

    hidden: int
    heads: int

    @nn.compact
    def __call__(self, widths: tuple[int, ...]) -> LayerWeights:
        matrix, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        vectors = nn.initializers.glorot_uniform(batch_axis=0)
        attention_shape = (len(EDGE_TYPES), self.heads, self.hidden // self.heads)
        return LayerWeights(
            kernel={
                name: self.param(f"kernel_{name}", matrix, (width, self.hidden))
                for name, width in zip(NODE_TYPES, widths, strict=True)
            },
            bias={name: self.param(f"bias_{name}", zeros, (self.hidden,)) for name in NODE_TYPES},
            source=self.param("source", vectors, attention_shape),
            destination=self.param("destination", vectors, attention_shape),
            semantic_kernel=self.param("semantic_kernel", matrix, (self.hidden, self.hidden)),
            semantic_bias=self.param("semantic_bias", zeros, (self.hidden,)),
            semantic_query=self.param("semantic_query", nn.initializers.normal(self.hidden**-0.5), (self.hidden,)),
        )


class HAN(nn.Module):
    """A stack of layers. `hidden` must be a multiple of `heads`."""

    hidden: int = 64
    heads: int = 8
    layers: int = 2
    residual: bool = True

    def setup(self):
        self.stack = [HANLayer(self.hidden, self.heads) for _ in range(self.layers)]

    def __call__(self, obs: GraphObservation) -> dict[str, jax.Array]:
        """The embeddings by node type, float32: arrived [..., hidden], expert [..., N, hidden], running and waiting
        [..., N, K, hidden], zeros for masked slots.

        Under jit an embedding that is not used costs nothing: the last layer computes only what the others need.
        """
        state = _DenseState.of(obs)
        for layer in self.stack:
            state = _dense_layer(layer(state.widths()), state, self.residual)
        return state.embeddings()

    def on_graph(self, graph: GraphsTuple, widths: tuple[int, ...]) -> jax.Array:
        """The embeddings float32 [V, hidden] of all nodes of a graph; zeros for PADDING nodes.

        `graph`: `hetero.to_graphs_tuple`, or a batch of such. `widths`: `hetero.feature_widths` of the observations,
        since the graph's own features are padded to one width.
        """
        nodes = cast(dict[str, jax.Array], graph.nodes)  # jraph says no more than that they are trees
        features = nodes["features"]
        for layer in self.stack:
            features = _graph_layer(layer(widths), graph, nodes["type"], features, self.residual)
            widths = (self.hidden,) * len(NODE_TYPES)
        return features


def _graph_layer(
    weights: LayerWeights, graph: GraphsTuple, kind: jax.Array, features: jax.Array, residual: bool
) -> jax.Array:
    """One layer on a graph's edges: node types int32 [V] and features [V, F] to features [V, hidden]."""
    num_types, heads, width = weights.source.shape

    projected = jnp.zeros((features.shape[0], heads * width), features.dtype)
    for name in NODE_TYPES:
        kernel = weights.kernel[name]
        of_type = features[:, : kernel.shape[0]] @ kernel + weights.bias[name]
        projected = jnp.where(kind[:, None] == node_type(name), of_type, projected)

    messages = attend(graph, projected.reshape(-1, heads, width), weights.source, weights.destination)
    messages = jax.nn.relu(messages).reshape(num_types, -1, heads * width)
    messages = messages.transpose(1, 0, 2)  # [V, edge types, hidden]

    # Semantic attention: an edge type's score is a mean over the nodes it can reach, and only those nodes may weigh it.
    reaches = jnp.equal(kind[:, None], jnp.array([node_type(destination) for _, destination in EDGE_TYPES]))
    scores = graph_mean(graph, _semantic_score(weights, messages), reaches)
    shares = jax.nn.softmax(jnp.where(reaches, scores, jnp.finfo(scores.dtype).min), axis=1)
    output = jnp.einsum("vt,vtd->vd", jnp.where(reaches, shares, 0.0), messages)
    return output + projected if residual else output


def _semantic_score(weights: LayerWeights, messages: jax.Array) -> jax.Array:
    """q . tanh(W message + b), float32 [...], for messages [..., hidden]."""
    return jnp.tanh(messages @ weights.semantic_kernel + weights.semantic_bias) @ weights.semantic_query


class _DenseState(flax.struct.PyTreeNode):
    """Node states between dense layers.

    A queued request hears only from its own expert, so in every layer its state is affine in its raw features:
    features @ slope + offset, with one slope for all and one offset for each expert. Keeping these two instead of the
    states means that nothing as wide as `hidden` is ever computed for a queue slot.
    """

    arrived: jax.Array  # float32 [..., F]
    expert: jax.Array  # float32 [..., N, F]
    features: dict[str, jax.Array]  # per queue, float32 [..., N, K, Fq], raw, zero where masked
    mask: dict[str, jax.Array]  # per queue, bool [..., N, K]
    slope: dict[str, jax.Array]  # per queue, float32 [Fq, F]
    offset: dict[str, jax.Array]  # per queue, float32 [..., N, F] or [F]

    @classmethod
    def of(cls, obs: GraphObservation) -> _DenseState:
        mask = {"running": obs.running_mask, "waiting": obs.waiting_mask}
        # Zeroed, not only masked in the attention: what stands in an empty slot, even NaN, must not reach a gradient.
        features = {queue: jnp.where(real[..., None], getattr(obs, queue), 0.0) for queue, real in mask.items()}
        slope = {queue: jnp.eye(x.shape[-1], dtype=x.dtype) for queue, x in features.items()}
        offset = {queue: jnp.zeros(x.shape[-1], x.dtype) for queue, x in features.items()}
        return cls(arrived=obs.arrived, expert=obs.expert, features=features, mask=mask, slope=slope, offset=offset)

    def widths(self) -> tuple[int, ...]:
        running, waiting = self.slope["running"], self.slope["waiting"]
        return self.arrived.shape[-1], self.expert.shape[-1], running.shape[-1], waiting.shape[-1]

    def embeddings(self) -> dict[str, jax.Array]:
        queues = {}
        for queue, mask in self.mask.items():
            states = self.features[queue] @ self.slope[queue] + self.offset[queue][..., None, :]
            queues[queue] = jnp.where(mask[..., None], states, 0.0)
        return {"arrived": self.arrived, "expert": self.expert, **queues}


def _dense_layer(weights: LayerWeights, state: _DenseState, residual: bool) -> _DenseState:
    """One layer on dense arrays. Where a destination has one source only, no attention is computed: its weight is 1."""
    source = dict(zip(EDGE_TYPES, weights.source, strict=True))
    destination = dict(zip(EDGE_TYPES, weights.destination, strict=True))

    def project(name: str, x: jax.Array) -> jax.Array:
        return x @ weights.kernel[name] + weights.bias[name]

    arrived, expert = project("arrived", state.arrived), project("expert", state.expert)

    # Messages to the experts, one for each edge type that reaches them.
    from_arrived = jax.nn.relu(arrived)[..., None, :]
    slope, offset, from_queue = {}, {}, {}
    for queue, mask in state.mask.items():
        slope[queue] = state.slope[queue] @ weights.kernel[queue]
        offset[queue] = project(queue, state.offset[queue])
        edge = (queue, "expert")
        logits = _dot(offset[queue], source[edge]) + _dot(expert, destination[edge])
        attended = _attend_queue(state.features[queue], mask, slope[queue], source[edge], logits) + offset[queue]
        from_queue[queue] = jax.nn.relu(jnp.where(mask.any(-1, keepdims=True), attended, 0.0))

    # Semantic attention of the experts. Every other node type is reached by one edge type, which then weighs 1.
    messages = (from_arrived, from_queue["running"], from_queue["waiting"])
    scores = jnp.stack([_semantic_score(weights, message).mean(-1) for message in messages], axis=-1)
    shares = jax.nn.softmax(scores)[..., None, None, :]
    to_expert = sum(shares[..., i] * message for i, message in enumerate(messages))

    # Message to the arrived node: attention over the experts.
    edge = ("expert", "arrived")
    logits = jax.nn.leaky_relu(_dot(expert, source[edge]) + _dot(arrived, destination[edge])[..., None, :], LEAKY_SLOPE)
    attention = jax.nn.softmax(logits, axis=-2)
    heads, width = source[edge].shape
    by_head = expert.reshape(*expert.shape[:-1], heads, width)
    to_arrived = jax.nn.relu((attention[..., None] * by_head).sum(-3).reshape(arrived.shape))

    to_queued = jax.nn.relu(expert)
    if not residual:
        return state.replace(
            arrived=to_arrived,
            expert=to_expert,
            slope=jax.tree.map(jnp.zeros_like, slope),
            offset={queue: to_queued for queue in offset},
        )
    return state.replace(
        arrived=to_arrived + arrived,
        expert=to_expert + expert,
        slope=slope,
        offset={queue: to_queued + own for queue, own in offset.items()},
    )


def _dot(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """The dot product of each head, [..., H * D] with [H, D] -> [..., H], as one product of matrices."""
    return x @ _block_diagonal(vectors[..., None])


def _block_diagonal(blocks: jax.Array) -> jax.Array:
    """[H, rows, columns] -> [H * rows, H * columns]."""
    heads, rows, columns = blocks.shape
    return (blocks[:, :, None, :] * jnp.eye(heads)[:, None, :, None]).reshape(heads * rows, heads * columns)


def _attend_queue(
    features: jax.Array, mask: jax.Array, slope: jax.Array, source: jax.Array, expert_logits: jax.Array
) -> jax.Array:
    """The part of an attention-weighted mean of one queue that is due to the slots' features: float32 [..., N, hidden].

    Slots count as `features` [..., N, K, Fq] @ `slope` [Fq, hidden]. The product with `slope` is taken after the mean,
    on [..., N, H, Fq]. `expert_logits` [..., N, H]: the part of the attention logits that the slots of an expert share.
    """
    heads, width = source.shape
    by_head = slope.reshape(-1, heads, width).swapaxes(0, 1)  # [H, Fq, D]
    # Heads before slots: the softmax then runs along the rows, and the mean is a plain product of matrices.
    slot_logits = jnp.einsum("hf,...kf->...hk", jnp.einsum("hfd,hd->hf", by_head, source), features)
    logits = jax.nn.leaky_relu(slot_logits + expert_logits[..., None], LEAKY_SLOPE)
    # finfo.min and not -inf: an empty queue then gives equal weights on zeros, and finite gradients.
    attention = jax.nn.softmax(jnp.where(mask[..., None, :], logits, jnp.finfo(logits.dtype).min))
    pooled = attention @ features
    return pooled.reshape(*pooled.shape[:-2], -1) @ _block_diagonal(by_head)
