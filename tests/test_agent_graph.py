"""The jraph side: the graph that an observation becomes, and the jraph functions that are relied on."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import jraph
import numpy as np

import jaxroute
from jaxroute.agent import graph as graph_module
from jaxroute.agent import node_types
from tests.network_cases import random_observation, with_whole_queues


def test_jraph_is_imported_in_one_module_only():
    importers = []
    root = Path(jaxroute.__path__[0])
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] == "jraph" for module in modules):
                importers.append(str(path.relative_to(root)))
    assert importers == ["agent/graph.py"]


def test_jraph_functions_in_use_still_work():
    ids = jnp.array([0, 0, 2])
    np.testing.assert_allclose(jraph.segment_sum(jnp.array([1.0, 2.0, 3.0]), ids, 3), [3.0, 0.0, 3.0])
    np.testing.assert_allclose(jraph.segment_softmax(jnp.array([1.0, 1.0, 5.0]), ids, 3), [0.5, 0.5, 1.0])
    graph = graph_module.to_graphs_tuple(random_observation(0))
    nodes, edges = int(graph.n_node[0]), int(graph.n_edge[0])
    both = jraph.batch([graph, graph])
    padded = jraph.pad_with_graphs(both, 2 * nodes + 5, 2 * edges + 3, 4)
    np.testing.assert_array_equal(padded.n_node, [nodes, nodes, 5, 0])
    np.testing.assert_array_equal(jraph.unpad_with_graphs(padded).senders, both.senders)


def test_nodes_and_edges_follow_the_observation():
    obs = random_observation(1, num_experts=2, slots=3)
    graph = graph_module.to_graphs_tuple(obs)
    types, features = np.array(graph.nodes["type"]), np.array(graph.nodes["features"])
    expected = [1, 2, 2, *np.where(obs.running_mask, 3, 0).ravel(), *np.where(obs.waiting_mask, 4, 0).ravel()]
    np.testing.assert_array_equal(types, expected)
    np.testing.assert_array_equal(features[1:3], obs.expert)
    np.testing.assert_array_equal(features[3:9, :5], obs.running.reshape(6, 5) * (types[3:9] == 3)[:, None])
    assert (features[types == node_types.PADDING] == 0).all()

    # Every real edge joins the node types that its own type names, and every real queued request has one edge each way.
    edge_types = np.array(graph.edges["type"])
    for kind, sender, receiver in zip(edge_types, graph.senders, graph.receivers, strict=True):
        ends = (types[sender], types[receiver])
        if kind == node_types.PADDING:
            assert node_types.PADDING in ends or sender == receiver == 0  # the arrived node is its own parent
        else:
            assert ends == tuple(map(node_types.node_type, node_types.EDGE_TYPES[kind - 1]))
    counts = [2, 2, *[int(obs.running_mask.sum())] * 2, *[int(obs.waiting_mask.sum())] * 2]
    np.testing.assert_array_equal(np.bincount(edge_types, minlength=7)[1:], counts)

    into_expert = edge_types == node_types.EDGE_TYPES.index(("running", "expert")) + 1
    owners = dict(zip(graph.senders[into_expert].tolist(), graph.receivers[into_expert].tolist(), strict=True))
    assert owners == {3 + i: 1 + i // 3 for i in range(6) if obs.running_mask.ravel()[i]}


def test_conversion_works_under_jit_and_vmap():
    observations = random_observation(2, 4)
    graphs = jax.jit(jax.vmap(graph_module.to_graphs_tuple))(observations)
    alone = graph_module.to_graphs_tuple(jax.tree.map(lambda x: x[2], observations))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[2], graphs), alone)


def test_a_batch_is_what_jraph_makes_of_its_graphs():
    observations = random_observation(3, 2, 2)
    alone = [
        graph_module.to_graphs_tuple(jax.tree.map(lambda x, i=i, j=j: x[i, j], observations))
        for i in range(2)
        for j in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, graph_module.to_graphs_tuple(observations), jraph.batch(alone))


def real_edges(graph: jraph.GraphsTuple) -> set[tuple[bytes, bytes, int]]:
    """(features of the sender, of the receiver, type) of every edge that is not PADDING."""
    features = np.asarray(graph.nodes["features"])
    edges = zip(graph.edges["type"].tolist(), graph.senders.tolist(), graph.receivers.tolist(), strict=True)
    return {(features[i].tobytes(), features[j].tobytes(), kind) for kind, i, j in edges if kind}


def test_packing_leaves_out_padding_and_graphs_that_are_not_chosen():
    graph = graph_module.to_graphs_tuple(random_observation(4, 4))
    chosen = jnp.array([True, False, True, True])
    kept = [single for single, wanted in zip(jraph.unbatch(graph), chosen, strict=True) if wanted]
    counts = [int((single.nodes["type"] != node_types.PADDING).sum()) for single in kept]
    room = sum(counts) + 3
    packed = jax.jit(graph_module.pack, static_argnums=2)(graph, chosen, room)
    np.testing.assert_array_equal(packed.n_node, [counts[0], 0, *counts[1:], 3])
    np.testing.assert_array_equal(packed.n_edge, 2 * packed.n_node)
    assert (packed.nodes["type"][:-3] != node_types.PADDING).all()
    assert (packed.nodes["type"][-3:] == node_types.PADDING).all() and (packed.nodes["features"][-3:] == 0).all()
    assert real_edges(packed) == set.union(*map(real_edges, kept))
    exact = graph_module.pack(graph, chosen, sum(counts))
    np.testing.assert_array_equal(exact.nodes["features"], packed.nodes["features"][:-3])
    assert real_edges(exact) == real_edges(packed)


def test_whole_queues_are_the_same_graph():
    obs = random_observation(5, 3)
    either = (graph_module.to_graphs_tuple(x) for x in (obs, with_whole_queues(obs)))
    shown, whole = (real_edges(graph) for graph in either)
    assert shown == whole


def test_attention_sums_to_the_neighbours_features_when_they_are_equal():
    """Weights sum to 1 over a destination's neighbours, and a destination without neighbours gets zeros."""
    obs = random_observation(3)
    graph = graph_module.to_graphs_tuple(obs)
    vectors = jax.random.normal(jax.random.key(0), (2, len(node_types.EDGE_TYPES), 2, 3))
    heard = jax.jit(graph_module.attend)(graph, jnp.ones((graph.nodes["type"].shape[0], 2, 3)), *vectors)
    experts = slice(1, 4)
    assert node_types.edges_into("expert") == [0, 2, 4]  # arrived, running, waiting
    running, waiting = (np.array(mask).any(1).astype(float) for mask in (obs.running_mask, obs.waiting_mask))
    np.testing.assert_allclose(heard[experts, 0, 1, 2], 1.0, atol=1e-6)
    np.testing.assert_allclose(heard[experts, 1, 0, 0], running, atol=1e-6)
    np.testing.assert_allclose(heard[experts, 2, 1, 0], waiting, atol=1e-6)
    real = np.array(graph.nodes["type"]) != node_types.PADDING
    np.testing.assert_allclose(heard[real, 0], 1.0, atol=1e-6)
    np.testing.assert_allclose(heard[~real], 0.0)
    np.testing.assert_allclose(heard[4:, 1:], 0.0)
    np.testing.assert_allclose(heard[0, 1:], 0.0)


def test_graph_mean_is_taken_within_each_graph():
    graph = jraph.batch(
        [graph_module.to_graphs_tuple(random_observation(seed, num_experts=1, slots=1)) for seed in (0, 1)]
    )
    nodes, values = jnp.array([0, 1, 4, 7, 8]), jnp.array([0.0, 1.0, 4.0, 7.0, jnp.nan])  # node 8 is none
    np.testing.assert_allclose(graph_module.graph_mean(graph, nodes, values)[:4], [0.5, 0.5, 5.5, 5.5])
