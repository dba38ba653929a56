"""The jraph path of the graph attention network: observations as batched graphs, without their empty queue slots.

JAX needs static shapes, so a graph has a fixed number of nodes. `embed_in_parts` processes as many such graphs, one
after the other, as the requests of the batch need. It is exact for queues of any length, and its cost grows with the
number of requests.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.agent.graph import GraphsTuple, attend, find, graph_mean, pack, to_graphs_tuple
from jaxroute.agent.han_weights import LayerWeights
from jaxroute.agent.node_types import PADDING, QUEUES, node_type
from jaxroute.environment.observation import RoutingGraph


def embed_in_parts(weights: list[LayerWeights], obs: RoutingGraph, residual: bool) -> jax.Array:
    """The embeddings of each observation's arrived node and experts, float32 [B, 1 + N, hidden]. `obs` has any leading
    batch axes; B is their product.

    The batch's nodes, without empty slots, are numbered consecutively. A part consists of the observations whose first
    nodes are in one interval of `size` numbers, so it has fewer nodes than `size` plus the largest graph. `size` has
    room for one request per expert; twice as much was no faster, with three requests per expert or with one.

    Under `jax.vmap` over observations, each one is a batch of its own, with room for all its slots. Pass batches as
    leading axes instead.
    """
    graph = to_graphs_tuple(obs)
    nodes: Any = graph.nodes  # jraph declares them as arbitrary trees
    num_graphs, num_experts = len(graph.n_node), obs.expert.shape[-2]
    largest = len(nodes["type"]) // num_graphs
    size = num_graphs * (1 + 2 * num_experts)
    num_nodes = min(size + largest, num_graphs * largest)
    ends = jnp.cumsum((nodes["type"] != PADDING).reshape(num_graphs, largest).sum(axis=1))
    part = jnp.append(0, ends[:-1]) // size  # of each observation

    def embed(inputs: tuple[list[LayerWeights], jax.Array], constants: Any, index: jax.Array) -> jax.Array:
        """The embeddings of the observations of a part, and zeros for the others."""
        (weights, features), (graph, part) = inputs, constants
        graph = pack(graph._replace(nodes={**graph.nodes, "features": features}), part == index, num_nodes)
        embeddings = graph_layers(weights, graph, num_graphs * num_experts, residual)
        first = (jnp.cumsum(graph.n_node) - graph.n_node)[:-1]  # first nodes of all graphs but the last, of PADDING
        rows = first[:, None] + jnp.arange(1 + num_experts)
        rows = jnp.where((part == index)[:, None], rows, num_nodes)
        return embeddings.at[rows].get(mode="fill", fill_value=0)

    return _sum_over(embed, part[-1] + 1, (weights, nodes["features"]), (graph, part))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over(function: Callable[..., Any], count: jax.Array, inputs: Any, constants: Any) -> Any:
    """The sum of `function(inputs, constants, index)` over index 0..count - 1, with a gradient for `inputs`.

    `count` is traced, so this is a loop of unknown length. JAX has no reverse-mode gradient of such a loop, because it
    would have to store the intermediate values of every iteration. Here the gradient computes them again.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, inputs, constants, count))

    def add(index: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, function(inputs, constants, index))

    return jax.lax.fori_loop(0, count, add, zeros)


def _sum_over_forward(function: Callable[..., Any], count: jax.Array, inputs: Any, constants: Any) -> tuple[Any, Any]:
    return _sum_over(function, count, inputs, constants), (count, inputs, constants)


def _sum_over_backward(function: Callable[..., Any], kept: Any, gradient: Any) -> tuple[None, Any, None]:
    count, inputs, constants = kept

    def of_one(inputs: Any, constants: Any, index: jax.Array) -> Any:
        return jax.vjp(lambda inputs: function(inputs, constants, index), inputs)[1](gradient)[0]

    return None, _sum_over(of_one, count, inputs, constants), None


_sum_over.defvjp(_sum_over_forward, _sum_over_backward)


def graph_layers(weights: list[LayerWeights], graph: GraphsTuple, num_experts: int, residual: bool) -> jax.Array:
    """Like `HAN.on_graph`, but with the weights of the layers as an argument."""
    nodes: Any = graph.nodes
    features = jnp.asarray(nodes["features"])  # jraph pads on the host and returns NumPy arrays
    for layer in weights:
        features = _graph_layer(layer, graph, nodes["type"], features, num_experts, residual)
    return features


def _graph_layer(
    weights: LayerWeights, graph: GraphsTuple, kind: jax.Array, features: jax.Array, num_experts: int, residual: bool
) -> jax.Array:
    """One layer on a graph's edges, from node types `kind` (int32 [V]) and features [V, F] to features [V, hidden]."""
    _, heads, width = weights.source.shape
    arrived = find(kind == node_type("arrived"), graph.n_node.shape[0])
    experts = find(kind == node_type("expert"), num_experts)

    def of_type(name: str, rows: jax.Array) -> jax.Array:
        kernel = weights.kernel[name]
        return rows[:, : kernel.shape[0]] @ kernel + weights.bias[name]

    # Most nodes are requests, so their projections are computed for all rows; the others only for the rows they need.
    projected = jnp.zeros((len(kind), heads * width), features.dtype)
    for queue in QUEUES:
        projected = jnp.where((kind == node_type(queue))[:, None], of_type(queue, features), projected)
    for name, rows in (("arrived", arrived), ("expert", experts)):
        projected = projected.at[rows].set(of_type(name, features.at[rows].get(mode="fill", fill_value=0)))

    messages = attend(graph, projected.reshape(-1, heads, width), weights.source, weights.destination)
    messages = jax.nn.relu(messages).reshape(len(kind), -1, heads * width)  # [V, MOST_EDGE_TYPES, hidden]

    # Semantic attention. Only experts are reached by several edge types; for other nodes, the one type has weight 1.
    to_experts = messages.at[experts].get(mode="fill", fill_value=0)
    mixed = jnp.tanh(to_experts @ weights.semantic_kernel + weights.semantic_bias)
    shares = jax.nn.softmax(graph_mean(graph, experts, mixed @ weights.semantic_query), axis=1)
    output = messages[:, 0].at[experts].set(jnp.einsum("nt,ntd->nd", shares, to_experts))
    return output + projected if residual else output
