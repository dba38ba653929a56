"""The routing graph as a `jraph.GraphsTuple`, and the segment operations that attention on it needs.

The only module that imports jraph (frozen since 2022), so that only this file has to change if jraph breaks.

Node and edge types are kept as integers in one homogeneous index space. Type 0 is PADDING: an edge of it carries no
message, a node of it stays zero. `jraph.pad_with_graphs` fills with zeros, so what it adds is PADDING too.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import jraph

from jaxroute.environment.observation import GraphObservation

GraphsTuple = jraph.GraphsTuple

PADDING = 0
NODE_TYPES = ("arrived", "expert", "running", "waiting")  # integer type = index + 1
EDGE_TYPES = (  # (source, destination); integer type = index + 1
    ("arrived", "expert"),
    ("expert", "arrived"),
    ("running", "expert"),
    ("expert", "running"),
    ("waiting", "expert"),
    ("expert", "waiting"),
)
LEAKY_SLOPE = 0.2  # of the attention's LeakyReLU


def node_type(name: str) -> int:
    """The integer type of nodes called `name`, one of NODE_TYPES."""
    return NODE_TYPES.index(name) + 1


def feature_widths(obs: GraphObservation) -> tuple[int, ...]:
    """Number of features of each node type, in the order of NODE_TYPES."""
    return tuple(getattr(obs, name).shape[-1] for name in NODE_TYPES)


def to_graphs_tuple(obs: GraphObservation) -> jraph.GraphsTuple:
    """One graph of one (unbatched) observation; works under jit and vmap, since no shape depends on the masks.

    Nodes, V = 1 + N + 2 N K, in this order: arrived, experts, running slots (expert by expert), waiting slots:
    `{"type": int32 [V], "features": float32 [V, widest type]}`. Edges, E = 2 N + 4 N K: `{"type": int32 [E]}`.
    A queue slot without a request is a PADDING node of zeros, and its two edges are PADDING edges.
    """
    num_experts, slots = obs.running_mask.shape
    queued = num_experts * slots
    running_mask, waiting_mask = obs.running_mask.reshape(-1), obs.waiting_mask.reshape(-1)

    widest = max(feature_widths(obs))
    rows = (
        obs.arrived[None],
        obs.expert,
        jnp.where(running_mask[:, None], obs.running.reshape(queued, -1), 0.0),
        jnp.where(waiting_mask[:, None], obs.waiting.reshape(queued, -1), 0.0),
    )
    features = jnp.concatenate([jnp.pad(x, ((0, 0), (0, widest - x.shape[1]))) for x in rows])
    real = (jnp.ones(1, bool), jnp.ones(num_experts, bool), running_mask, waiting_mask)
    node_types = jnp.concatenate([jnp.where(mask, i + 1, PADDING) for i, mask in enumerate(real)])

    arrived = jnp.zeros(num_experts, jnp.int32)
    expert = 1 + jnp.arange(num_experts, dtype=jnp.int32)
    owner = jnp.repeat(expert, slots)
    running = 1 + num_experts + jnp.arange(queued, dtype=jnp.int32)
    waiting = running + queued
    ends = {  # (source nodes, destination nodes, real edges) per EDGE_TYPES
        ("arrived", "expert"): (arrived, expert, real[1]),
        ("expert", "arrived"): (expert, arrived, real[1]),
        ("running", "expert"): (running, owner, running_mask),
        ("expert", "running"): (owner, running, running_mask),
        ("waiting", "expert"): (waiting, owner, waiting_mask),
        ("expert", "waiting"): (owner, waiting, waiting_mask),
    }
    edge_types = jnp.concatenate([jnp.where(ends[pair][2], i + 1, PADDING) for i, pair in enumerate(EDGE_TYPES)])
    return jraph.GraphsTuple(
        nodes={"type": node_types.astype(jnp.int32), "features": features},
        edges={"type": edge_types.astype(jnp.int32)},
        senders=jnp.concatenate([ends[pair][0] for pair in EDGE_TYPES]),
        receivers=jnp.concatenate([ends[pair][1] for pair in EDGE_TYPES]),
        n_node=jnp.array([features.shape[0]], jnp.int32),
        n_edge=jnp.array([edge_types.shape[0]], jnp.int32),
        globals=None,
    )


def attend(graph: jraph.GraphsTuple, features: jax.Array, source: jax.Array, destination: jax.Array) -> jax.Array:
    """Multi-head attention of every node over its neighbours, for each edge type apart.

    `features` float32 [V, H, D]; `source`, `destination` float32 [types, H, D] are the attention vectors. Returns
    float32 [types, V, H, D]: the sum of the sources' features, weighted by a softmax over the neighbours of that edge
    type of LeakyReLU(source . the source's features + destination . its own features); zeros without neighbours.
    """
    edges = cast(dict[str, jax.Array], graph.edges)  # jraph says no more than that they are trees
    kind = edges["type"]
    senders, receivers = cast(tuple[jax.Array, jax.Array], (graph.senders, graph.receivers))
    num_nodes, num_types = features.shape[0], source.shape[0]
    # One segment for each (edge type, destination node); PADDING edges land in the first block, which is dropped.
    segments = kind * num_nodes + receivers
    num_segments = (num_types + 1) * num_nodes
    vectors = jnp.maximum(kind - 1, 0)
    sent = features[senders]
    logits = (sent * source[vectors] + features[receivers] * destination[vectors]).sum(-1)
    weights = jraph.segment_softmax(jax.nn.leaky_relu(logits, LEAKY_SLOPE), segments, num_segments)
    summed = jraph.segment_sum(cast(jax.Array, weights)[..., None] * sent, segments, num_segments)
    return summed.reshape(num_types + 1, *features.shape)[1:]


def graph_mean(graph: jraph.GraphsTuple, values: jax.Array, mask: jax.Array) -> jax.Array:
    """For each node, the mean of `values` over the nodes of its own graph where `mask` holds, 0 if there are none.

    `values` float32 and `mask` bool: [V, ...]. Returns float32 [V, ...].
    """
    num_graphs, num_nodes = graph.n_node.shape[0], values.shape[0]
    owner = jnp.repeat(jnp.arange(num_graphs), graph.n_node, total_repeat_length=num_nodes)
    total = jraph.segment_sum(jnp.where(mask, values, 0.0), owner, num_graphs)
    count = jraph.segment_sum(mask.astype(values.dtype), owner, num_graphs)
    return (total / jnp.maximum(count, 1.0))[owner]
