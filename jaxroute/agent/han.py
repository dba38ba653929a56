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

from jaxroute.agent.graph import EDGE_TYPES, LEAKY_SLOPE, NODE_TYPES, GraphsTuple, attend, graph_mean, node_type
from jaxroute.environment.observation import GraphObservation

QUEUES = ("running", "waiting")
_EMPTY = -1e9  # attention logit of a slot without a request: its weight is exactly 0


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
        """`widths`: F of each node type."""
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
        """Its layers; the first reads raw features, each other one the embeddings of the layer before."""
        self.stack = [HANLayer(self.hidden, self.heads) for _ in range(self.layers)]

    def __call__(self, obs: GraphObservation) -> dict[str, jax.Array]:
        """The embeddings by node type, float32: arrived [..., hidden], expert [..., N, hidden], running and waiting
        [..., N, K, hidden], zeros for masked slots.
        """
        return self.states(obs)[-1].by_node(obs.arrived.shape[:-1])

    def states(self, obs: GraphObservation) -> list[NodeStates]:
        """The raw features, then the node states after each layer.

        Under jit a state that is not used costs nothing: the last layer computes only what the others need.
        """
        states = [NodeStates.of(obs)]
        for layer in self.stack:
            states.append(_dense_layer(layer(states[-1].widths()), states[-1], self.residual))
        return states

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
    mixed = jnp.tanh(messages @ weights.semantic_kernel + weights.semantic_bias)
    scores = graph_mean(graph, mixed @ weights.semantic_query, reaches)
    shares = jax.nn.softmax(jnp.where(reaches, scores, jnp.finfo(scores.dtype).min), axis=1)
    output = jnp.einsum("vt,vtd->vd", jnp.where(reaches, shares, 0.0), messages)
    return output + projected if residual else output


class NodeStates(flax.struct.PyTreeNode):
    """Node states between dense layers: features first, then what differs between nodes, and the B graphs last.

    In this order a product with weights is one product of two matrices, and all else runs along the graphs.

    A queued request hears only from its own expert, so in every layer its state is affine in its raw features:
    features times slope, plus offset, with one slope for all and one offset for each expert. Keeping these two instead
    of the states means that nothing as wide as `hidden` is ever computed for a queue slot.
    """

    arrived: jax.Array  # float32 [F, B]
    expert: jax.Array  # float32 [F, N, B]
    slots: dict[str, jax.Array]  # per queue, float32 [Fq + 1, K, N, B]: raw features, then 0 or, if empty, _EMPTY
    slope: dict[str, jax.Array]  # per queue, float32 [Fq, F]
    offset: dict[str, jax.Array]  # per queue, float32 [F, N, B] or, if the same everywhere, [F, 1, 1]

    @classmethod
    def of(cls, obs: GraphObservation) -> NodeStates:
        """The raw features of observations with any leading batch axes, B in all."""
        slots = {}
        for queue in QUEUES:
            mask = _graphs_last(getattr(obs, f"{queue}_mask"), 2)
            # Zeroed, not only masked in the attention: what an empty slot holds, even NaN, must not reach a gradient.
            features = jnp.where(mask, _graphs_last(getattr(obs, queue), 3), 0.0)
            rows = jnp.concatenate([features, jnp.where(mask, 0.0, _EMPTY)[None]])
            # XLA stores a product; all else, the transposition too, it would do anew wherever the slots are used.
            slots[queue] = jnp.einsum("fg,f...->g...", jnp.eye(len(rows), dtype=rows.dtype), rows, precision="highest")
        return cls(
            arrived=_graphs_last(obs.arrived, 1),
            expert=_graphs_last(obs.expert, 2),
            slots=slots,
            slope={queue: jnp.eye(len(x) - 1, dtype=x.dtype) for queue, x in slots.items()},
            offset={queue: jnp.zeros((len(x) - 1, 1, 1), x.dtype) for queue, x in slots.items()},
        )

    def widths(self) -> tuple[int, ...]:
        """Number of features of each node type, in the order of NODE_TYPES."""
        return len(self.arrived), len(self.expert), *(self.slope[queue].shape[1] for queue in QUEUES)

    def by_node(self, batch: tuple[int, ...]) -> dict[str, jax.Array]:
        """The states by node type, float32 [*batch, (N, (K,)) F]; zeros for empty slots."""
        nodes = {"arrived": self.arrived, "expert": self.expert}
        for queue, slots in self.slots.items():
            states = project(self.slope[queue], slots[:-1]) + self.offset[queue][:, None]
            nodes[queue] = jnp.where(slots[-1] == 0, states, 0.0)
        return {name: x.T.reshape(*batch, *x.T.shape[1:]) for name, x in nodes.items()}


def _graphs_last(x: jax.Array, axes: int) -> jax.Array:
    """[..., a, b, c] -> [c, b, a, B]: the last `axes` axes reversed, then the others as one."""
    return x.reshape(-1, *x.shape[x.ndim - axes :]).T


def project(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """`kernel` [F, G] on features [F, ...]: [G, ...], as one product of two matrices."""
    return (kernel.T @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


def _dense_layer(weights: LayerWeights, state: NodeStates, residual: bool) -> NodeStates:
    """One layer on dense arrays. Where a destination has one source only, no attention is computed: its weight is 1."""
    source = dict(zip(EDGE_TYPES, weights.source, strict=True))
    destination = dict(zip(EDGE_TYPES, weights.destination, strict=True))

    def by_type(name: str, x: jax.Array) -> jax.Array:
        return project(weights.kernel[name], x) + weights.bias[name].reshape(-1, *[1] * (x.ndim - 1))

    arrived, expert = by_type("arrived", state.arrived), by_type("expert", state.expert)

    # Messages to the experts, one for each edge type that reaches them.
    slope, offset, messages = {}, {}, [jax.nn.relu(arrived)[:, None]]
    for queue, slots in state.slots.items():
        edge = (queue, "expert")
        slope[queue] = state.slope[queue] @ weights.kernel[queue]
        offset[queue] = by_type(queue, state.offset[queue])
        logits = _dot(offset[queue], source[edge]) + _dot(expert, destination[edge])
        attended = _attend_queue(slots, slope[queue], source[edge], logits) + offset[queue]
        messages.append(jax.nn.relu(jnp.where((slots[-1] == 0).any(0), attended, 0.0)))

    # Semantic attention of the experts. Every other node type is reached by one edge type, which then weighs 1.
    scores = jnp.stack([_semantic_score(weights, message).mean(0) for message in messages])
    shares = jnp.exp(scores - jax.lax.stop_gradient(scores.max(0)))
    to_expert = sum(_scale(message, share) for message, share in zip(messages, shares, strict=True)) / shares.sum(0)

    # Message to the arrived node: attention over the experts.
    edge = ("expert", "arrived")
    logits = jax.nn.leaky_relu(_dot(expert, source[edge]) + _dot(arrived, destination[edge])[:, None], LEAKY_SLOPE)
    by_head = expert.reshape(*source[edge].shape, *expert.shape[1:])
    to_arrived = jax.nn.relu(_weighted_sum(jax.nn.softmax(logits, axis=1), by_head).reshape(arrived.shape))

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


def _semantic_score(weights: LayerWeights, messages: jax.Array) -> jax.Array:
    """q . tanh(W message + b): float32 [N, B] of messages [hidden, N, B]."""
    mixed = jnp.tanh(project(weights.semantic_kernel, messages) + weights.semantic_bias[:, None, None])
    return project(weights.semantic_query[:, None], mixed)[0]


def _dot(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """The dot product of each head, [H * D, ...] with [H, D] -> [H, ...], as one product of matrices."""
    return project(_block_diagonal(vectors), x)


def _block_diagonal(vectors: jax.Array) -> jax.Array:
    """[H, D] -> [H * D, H]."""
    heads, width = vectors.shape
    return (vectors[..., None] * jnp.eye(heads, dtype=vectors.dtype)[:, None]).reshape(heads * width, heads)


def _attend_queue(slots: jax.Array, slope: jax.Array, source: jax.Array, expert_logits: jax.Array) -> jax.Array:
    """The part of an attention-weighted mean of one queue that is due to the slots' features: float32 [hidden, N, B].

    `slots` [Fq + 1, K, N, B] count as their features times `slope` [Fq, hidden]. That product is taken after the mean,
    on [H, Fq, N, B]. `expert_logits` [H, N, B]: the part of the attention logits that the slots of an expert share.
    """
    heads, width = source.shape
    slot_logits = project(jnp.concatenate([slope @ _block_diagonal(source), jnp.ones((1, heads), slope.dtype)]), slots)
    logits = jax.nn.leaky_relu(slot_logits + expert_logits[:, None], LEAKY_SLOPE)
    # An empty queue has equal weights on zeros, and finite gradients.
    attention = jnp.exp(logits - jax.lax.stop_gradient(logits.max(1, keepdims=True)))
    pooled = _weighted_sum(attention, slots[None, :-1]) / attention.sum(1)[:, None]
    by_head = slope.reshape(-1, heads, width)
    mean = jnp.einsum("fhd,hfc->hdc", by_head, pooled.reshape(*pooled.shape[:2], -1))
    return mean.reshape(-1, *pooled.shape[2:])


# The sums of these two functions and of their gradients are written out, or as products of matrices: XLA's reductions
# take several times as long on a CPU.


@jax.custom_vjp
def _weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sum over K of weights [H, K, ...] times values [H or 1, F, K, ...]: [H, F, ...]."""
    return sum(weights[:, None, k] * values[:, :, k] for k in range(values.shape[2]))  # pyright: ignore[reportReturnType]


def _weighted_sum_gradient(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, values = inputs
    of_weights = sum(gradient[:, f, None] * values[:, f] for f in range(values.shape[1]))
    of_values = gradient[:, :, None] * weights[:, None]
    if len(values) == 1:
        of_values = of_values.sum(0, keepdims=True)
    return of_weights, of_values  # pyright: ignore[reportReturnType]


_weighted_sum.defvjp(lambda *inputs: (_weighted_sum(*inputs), inputs), _weighted_sum_gradient)


@jax.custom_vjp
def _scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [F, N, B] times factor [B]."""
    return x * factor


def _scale_gradient(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, factor = inputs
    return gradient * factor, project(jnp.ones((len(x), 1), x.dtype), gradient * x)[0].sum(0)


_scale.defvjp(lambda *inputs: (_scale(*inputs), inputs), _scale_gradient)
