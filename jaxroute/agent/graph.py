"""Observations as one batched `jraph.GraphsTuple`, and the segment operations that attention on it needs.

This is the only module that imports jraph (frozen since 2022), so only this file has to change if jraph breaks.

All nodes share one index space, and node and edge types are stored as integers (`node_types.py`).
`jraph.pad_with_graphs` fills with zeros, so the nodes and edges that it adds have the type PADDING.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from jaxroute.agent.node_types import (
    EDGE_TYPES,
    LEAKY_SLOPE,
    NODE_TYPES,
    PADDING,
    QUEUES,
    edges_into,
    feature_widths,
    node_type,
)
from jaxroute.environment.observation import FullGraphObservation, RoutingGraph

GraphsTuple = jraph.GraphsTuple

MOST_EDGE_TYPES = max(len(edges_into(name)) for name in NODE_TYPES)  # that reach one node: 3, at an expert

# For each integer type of an edge, its index among the edge types with the same destination.
_PLACES = np.array([0, *(edges_into(destination).index(i) for i, (_, destination) in enumerate(EDGE_TYPES))])
# For each integer type of a node, the types of the edges to and from its parent (see `to_graphs_tuple`).
_PARENTS = {"expert": "arrived", "running": "expert", "waiting": "expert"}
_TO_PARENT, _FROM_PARENT = (
    np.array([PADDING, *(EDGE_TYPES.index(edge(name)) + 1 if name in _PARENTS else PADDING for name in NODE_TYPES)])
    for edge in (lambda name: (name, _PARENTS[name]), lambda name: (_PARENTS[name], name))
)


def to_graphs_tuple(obs: RoutingGraph) -> jraph.GraphsTuple:
    """The graphs of observations with any leading batch axes, B graphs in total, as one batch.

    Nodes are `{"type": int32 [V], "features": float32 [V, widest type]}`. The nodes of a graph are, in this order, the
    arrived node, experts, running slots (expert by expert) and waiting slots: 1 + N + 2 N K nodes. A graph of a
    `FullGraphObservation` has the arrived node, experts and queue slots: 1 + N + N S nodes. A slot without a request
    is a PADDING node of zeros.

    Edges are `{"type": int32 [2 V]}`: for each node, in the order of the nodes, one edge to its parent and one from
    it. The parent of an expert is the arrived node, and the parent of a request is its expert. The arrived node and
    PADDING nodes have no parent, so their edges are PADDING.

    No shape depends on the masks, so this works under jit and vmap.
    """
    num_experts, slots = obs.running_mask.shape[-2:]
    num_graphs, widest = obs.arrived[..., 0].size, max(feature_widths(obs))
    running, waiting = (jnp.where(getattr(obs, f"{name}_mask"), node_type(name), PADDING) for name in QUEUES)
    if isinstance(obs, FullGraphObservation):
        queues = [(obs.queued, running + waiting)]  # a request is in one queue, so its type in the other is 0
    else:
        queues = [(obs.running, running), (obs.waiting, waiting)]
    blocks = [
        (obs.arrived, jnp.full(num_graphs, node_type("arrived"))),
        (obs.expert, jnp.full((num_graphs, num_experts), node_type("expert"))),
        *queues,
    ]

    def rows(features: jax.Array) -> jax.Array:
        features = features.reshape(num_graphs, -1, features.shape[-1])
        return jnp.pad(features, ((0, 0), (0, 0), (0, widest - features.shape[-1])))

    types = jnp.concatenate([types.reshape(num_graphs, -1) for _, types in blocks], axis=1)
    size = types.shape[1]
    experts = np.repeat(1 + np.arange(num_experts), slots)
    parents = np.concatenate([np.zeros(1 + num_experts, np.int32), *[experts] * len(queues)])
    parents = jnp.asarray(parents + size * np.arange(num_graphs)[:, None], jnp.int32).reshape(-1)
    types = types.reshape(-1)
    features = jnp.concatenate([rows(features) for features, _ in blocks], axis=1).reshape(-1, widest)
    nodes, n_node = jnp.arange(len(types)), jnp.full(num_graphs, size, jnp.int32)
    edge_types = jnp.asarray(_TO_PARENT)[types], jnp.asarray(_FROM_PARENT)[types]
    return jraph.GraphsTuple(
        nodes={"type": types, "features": jnp.where((types != PADDING)[:, None], features, 0.0)},
        edges={"type": jnp.stack(edge_types, axis=1).reshape(-1)},
        senders=jnp.stack([nodes, parents], axis=1).reshape(-1),
        receivers=jnp.stack([parents, nodes], axis=1).reshape(-1),
        n_node=n_node,
        n_edge=2 * n_node,
        globals=None,
    )


def pack(graph: jraph.GraphsTuple, chosen: jax.Array, num_nodes: int) -> jraph.GraphsTuple:
    """The `chosen` graphs (bool [B]) of a result of `to_graphs_tuple`, without PADDING nodes, with V = `num_nodes`.

    A graph that is not chosen has no nodes. An additional graph at the end consists of the unused nodes, which are
    PADDING. The chosen graphs must not have more than `num_nodes` real nodes.
    """
    types = _types(graph.nodes)
    by_graph = (types != PADDING).reshape(len(chosen), -1) & chosen[:, None]
    real = by_graph.reshape(-1)
    kept = find(real, num_nodes)

    def take(rows: jax.Array) -> jax.Array:
        return rows.at[kept].get(mode="fill", fill_value=0)

    def take_edges(rows: jax.Array) -> jax.Array:
        return take(rows.reshape(-1, 2)).reshape(-1)

    index = jnp.cumsum(real) - 1  # new index of each real node
    n_node = by_graph.sum(axis=1)
    n_node = jnp.append(n_node, num_nodes - n_node.sum())
    return graph._replace(
        nodes=jax.tree.map(take, graph.nodes),
        edges=jax.tree.map(take_edges, graph.edges),
        senders=index[take_edges(cast(jax.Array, graph.senders))],
        receivers=index[take_edges(cast(jax.Array, graph.receivers))],
        n_node=n_node,
        n_edge=2 * n_node,
    )


def _types(of: Any) -> jax.Array:
    """The types of a graph's nodes or edges, which jraph declares as arbitrary trees."""
    return of["type"]


def find(mask: jax.Array, size: int) -> jax.Array:
    """int32 [size]: the first `size` indices at which `mask` (bool [n]) is True, followed by n if there are fewer."""
    return jnp.nonzero(mask, size=size, fill_value=len(mask))[0]


def attend(graph: jraph.GraphsTuple, features: jax.Array, source: jax.Array, destination: jax.Array) -> jax.Array:
    """Multi-head attention of every node over its neighbours, separately for each edge type that reaches it.

    `features` is float32 [V, H, D]; `source` and `destination`, float32 [types, H, D], are the attention vectors.
    Returns float32 [V, MOST_EDGE_TYPES, H, D], with edge types in the order of `edges_into`: the weighted sum of the
    neighbours' features, or zeros without neighbours. The weights are a softmax over the neighbours of that edge type
    of LeakyReLU(source . the neighbour's features + destination . the node's own features).
    """
    kind = _types(graph.edges)
    senders, receivers = cast(tuple[jax.Array, jax.Array], (graph.senders, graph.receivers))
    # For each node and edge type, [V, types, H]: much less to gather per edge than the features.
    of_source, of_destination = (jnp.einsum("vhd,thd->vth", features, vectors) for vectors in (source, destination))
    vectors = jnp.maximum(kind - 1, 0)
    logits = jax.nn.leaky_relu(of_source[senders, vectors] + of_destination[receivers, vectors], LEAKY_SLOPE)
    # One segment per destination node and edge type that reaches it; PADDING edges are in the last, which is dropped.
    num_segments = features.shape[0] * MOST_EDGE_TYPES
    segments = jnp.where(kind == PADDING, num_segments, receivers * MOST_EDGE_TYPES + jnp.asarray(_PLACES)[kind])
    weights = cast(jax.Array, jraph.segment_softmax(logits, segments, num_segments + 1))
    summed = jraph.segment_sum(weights[..., None] * features[senders], segments, num_segments + 1)
    return summed[:-1].reshape(-1, MOST_EDGE_TYPES, *features.shape[1:])


def graph_mean(graph: jraph.GraphsTuple, nodes: jax.Array, values: jax.Array) -> jax.Array:
    """For each of `nodes` (int32 [M]), the mean of `values` (float32 [M, ...]) over those of `nodes` in its graph.

    An index of V or more, which `find` fills with, counts in no mean, and its own result has no meaning.
    """
    num_graphs, num_nodes = len(graph.n_node), len(_types(graph.nodes))
    owners = jnp.repeat(jnp.arange(num_graphs), graph.n_node, total_repeat_length=num_nodes)
    owners = owners.at[nodes].get(mode="fill", fill_value=num_graphs)
    return jraph.segment_mean(values, owners, num_graphs)[owners]
