"""The dense path of the graph attention network: arrays with masks, computed over all queue slots."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.agent.han_weights import LayerWeights
from jaxroute.agent.node_types import EDGE_TYPES, LEAKY_SLOPE, QUEUES
from jaxroute.environment.observation import RoutingGraph

_EMPTY = -1e9  # attention logit of a slot without a request, which makes its weight exactly 0


class NodeStates(flax.struct.PyTreeNode):
    """Node states between dense layers: features on the first axis, then the nodes, and the B graphs on the last.

    With this order, a product with weights is one product of two matrices, and all other operations run along the
    graphs.

    A queued request receives messages only from its own expert. Its state in every layer is therefore affine in its
    raw features: features times slope, plus offset, with one slope for all requests of a queue and one offset per
    expert. Only slope and offset are stored, so nothing as wide as `hidden` is computed for each queue slot.
    """

    arrived: jax.Array  # float32 [F, B]
    expert: jax.Array  # float32 [F, N, B]
    slots: dict[str, jax.Array]  # per queue, float32 [Fq + 1, K, N, B]: raw features, then 0, or _EMPTY if empty
    slope: dict[str, jax.Array]  # per queue, float32 [Fq, F]
    offset: dict[str, jax.Array]  # per queue, float32 [F, N, B], or [F, 1, 1] if all are the same

    @classmethod
    def of(cls, obs: RoutingGraph) -> NodeStates:
        """The raw features of observations with any leading batch axes; B is their product."""
        slots = {}
        for queue in QUEUES:
            mask = graphs_last(getattr(obs, f"{queue}_mask"), 2)
            # Set to 0, not only masked in attention, so that an empty slot's content, even NaN, reaches no gradient.
            features = jnp.where(mask, graphs_last(getattr(obs, queue), 3), 0.0)
            rows = jnp.concatenate([features, jnp.where(mask, 0.0, _EMPTY)[None]])
            # XLA stores the result of a product. It repeats other operations, such as transposition, at every use.
            slots[queue] = jnp.einsum("fg,f...->g...", jnp.eye(len(rows), dtype=rows.dtype), rows, precision="highest")
        return cls(
            arrived=graphs_last(obs.arrived, 1),
            expert=graphs_last(obs.expert, 2),
            slots=slots,
            slope={queue: jnp.eye(len(x) - 1, dtype=x.dtype) for queue, x in slots.items()},
            offset={queue: jnp.zeros((len(x) - 1, 1, 1), x.dtype) for queue, x in slots.items()},
        )

    def by_node(self, batch: tuple[int, ...]) -> dict[str, jax.Array]:
        """The states by node type, float32 [*batch, (N, (K,)) F]; empty slots have zeros."""
        nodes = {"arrived": self.arrived, "expert": self.expert}
        for queue, slots in self.slots.items():
            states = project(self.slope[queue], slots[:-1]) + self.offset[queue][:, None]
            nodes[queue] = jnp.where(slots[-1] == 0, states, 0.0)
        return {name: x.T.reshape(*batch, *x.T.shape[1:]) for name, x in nodes.items()}


def graphs_last(x: jax.Array, axes: int) -> jax.Array:
    """[..., a, b, c] -> [c, b, a, B]: reverses the last `axes` axes and joins the others to one."""
    return x.reshape(-1, *x.shape[x.ndim - axes :]).T


def project(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Applies `kernel` [F, G] to features [F, ...]: [G, ...], as one product of two matrices."""
    return (kernel.T @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


def dense_layer(weights: LayerWeights, state: NodeStates, residual: bool) -> NodeStates:
    """One layer on dense arrays. A destination with a single source needs no attention, because its weight is 1."""
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

    # Semantic attention of the experts. Other node types are reached by only one edge type, whose weight is 1.
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
    """The dot product of each head, [H * D, ...] with [H, D] -> [H, ...], as one product of two matrices."""
    return project(_block_diagonal(vectors), x)


def _block_diagonal(vectors: jax.Array) -> jax.Array:
    """[H, D] -> [H * D, H]."""
    heads, width = vectors.shape
    return (vectors[..., None] * jnp.eye(heads, dtype=vectors.dtype)[:, None]).reshape(heads * width, heads)


def _attend_queue(slots: jax.Array, slope: jax.Array, source: jax.Array, expert_logits: jax.Array) -> jax.Array:
    """The attention-weighted mean of one queue's states without their offset: float32 [hidden, N, B].

    The states are the features of `slots` [Fq + 1, K, N, B] times `slope` [Fq, hidden]. This product is applied after
    the mean, to [H, Fq, N, B]. `expert_logits` [H, N, B] is the part of the logits that an expert's slots share.
    """
    heads, width = source.shape
    slot_logits = project(jnp.concatenate([slope @ _block_diagonal(source), jnp.ones((1, heads), slope.dtype)]), slots)
    logits = jax.nn.leaky_relu(slot_logits + expert_logits[:, None], LEAKY_SLOPE)
    # An empty queue has equal weights on zeros, so its gradients are finite.
    attention = jnp.exp(logits - jax.lax.stop_gradient(logits.max(1, keepdims=True)))
    pooled = _weighted_sum(attention, slots[None, :-1]) / attention.sum(1)[:, None]
    by_head = slope.reshape(-1, heads, width)
    mean = jnp.einsum("fhd,hfc->hdc", by_head, pooled.reshape(*pooled.shape[:2], -1))
    return mean.reshape(-1, *pooled.shape[2:])


# The sums in these two functions and in their gradients are unrolled or written as products of matrices, because XLA's
# reductions take several times as long on a CPU.


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
