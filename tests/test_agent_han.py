"""The attention network: equal to PyTorch Geometric's, and its two paths equal to each other."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from jaxroute.agent.graph import EDGE_TYPES, NODE_TYPES, feature_widths, to_graphs_tuple
from jaxroute.agent.han import HAN
from jaxroute.environment.observation import GraphObservation
from tests.network_cases import random_observation, random_params, with_empty_queues

REFERENCE = Path(__file__).parent / "data" / "han_reference" / "han_two_layers.npz"
SLOTS = 6  # more than the reference's longest queue: some slots are padding
SPARE_NODES = 7  # of a padded graph


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def reference_params(arrays: dict[str, np.ndarray]) -> dict:
    """The reference's weights under the names of `HANLayer`."""

    def layer(prefix: str) -> dict[str, np.ndarray]:
        def vectors(side: str) -> np.ndarray:
            return np.concatenate([arrays[f"{prefix}.lin_{side}.{s}__to__{d}"] for s, d in EDGE_TYPES])

        return {
            **{f"kernel_{name}": arrays[f"{prefix}.proj.{name}.weight"].T for name in NODE_TYPES},
            **{f"bias_{name}": arrays[f"{prefix}.proj.{name}.bias"] for name in NODE_TYPES},
            "source": vectors("src"),
            "destination": vectors("dst"),
            "semantic_kernel": arrays[f"{prefix}.k_lin.weight"].T,
            "semantic_bias": arrays[f"{prefix}.k_lin.bias"],
            "semantic_query": arrays[f"{prefix}.q"][0],
        }

    return {"params": {"stack_0": layer("l1"), "stack_1": layer("l2")}}


def queue_places(arrays: dict[str, np.ndarray], queue: str) -> tuple[np.ndarray, np.ndarray]:
    """(expert, slot) of each queued request of the reference."""
    source, expert = arrays[f"edges_{queue}_to_expert"]
    assert (source == np.arange(len(source))).all()
    return expert, np.array([(expert[:i] == expert[i]).sum() for i in range(len(expert))])


def reference_observation(arrays: dict[str, np.ndarray]) -> GraphObservation:
    """The reference's graph as an observation, with garbage in the empty slots."""
    fields = {"arrived": arrays["x_arrived"][0], "expert": arrays["x_expert"]}
    for queue in ("running", "waiting"):
        places = queue_places(arrays, queue)
        features, mask = np.full((3, SLOTS, 6), 1e3, np.float32), np.zeros((3, SLOTS), bool)
        features[places], mask[places] = arrays[f"x_{queue}"], True
        fields |= {queue: features, f"{queue}_mask": mask}
    return jax.tree.map(jnp.asarray, GraphObservation(**fields, action_mask=np.ones(4, bool)))


@pytest.mark.parametrize("path", ["dense", "jraph"])
@pytest.mark.parametrize(("layers", "output"), [(1, "h"), (2, "out")])
def test_gives_the_reference(reference, layers, output, path):
    obs = reference_observation(reference)
    network = HAN(layers=layers, residual=False)
    if path == "dense":
        nodes = jax.jit(network.apply)(reference_params(reference), obs)
    else:
        nodes = by_name(on_graph(network)(reference_params(reference), to_graphs_tuple(obs), feature_widths(obs)), obs)
    for queue in ("running", "waiting"):
        nodes[queue] = nodes[queue][queue_places(reference, queue)]
    for name in NODE_TYPES:
        actual = np.atleast_2d(nodes[name])
        np.testing.assert_allclose(actual, reference[f"{output}_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


def on_graph(network: HAN):
    return jax.jit(functools.partial(network.apply, method=HAN.on_graph), static_argnums=2)


def by_name(nodes: jax.Array, obs: GraphObservation) -> dict[str, jax.Array]:
    """Splits node embeddings [..., V, hidden] of graphs of equal size as the dense path returns them."""
    batch, (num_experts, slots) = obs.running_mask.shape[:-2], obs.running_mask.shape[-2:]
    nodes = nodes.reshape(*batch, -1, nodes.shape[-1])
    ends = np.cumsum([1, num_experts, num_experts * slots])
    arrived, experts, running, waiting = jnp.split(nodes, ends, axis=-2)
    return {
        "arrived": arrived.squeeze(-2),
        "expert": experts,
        "running": running.reshape(*batch, num_experts, slots, -1),
        "waiting": waiting.reshape(*batch, num_experts, slots, -1),
    }


def padded_graph(observations: GraphObservation) -> jraph.GraphsTuple:
    """A batch [B] of observations as one batched graph, with spare nodes, edges and graphs at the end."""
    size = observations.arrived.shape[0]
    convert = jax.jit(to_graphs_tuple)
    graph = jraph.batch([convert(jax.tree.map(lambda x, i=i: x[i], observations)) for i in range(size)])
    nodes, edges = len(graph.nodes["type"]), len(graph.senders)
    return jraph.pad_with_graphs(graph, nodes + SPARE_NODES, edges + 5, size + 2)


def paths(network: HAN, observations: GraphObservation):
    """Both ways from parameters to embeddings by node type."""
    graph, widths = padded_graph(observations), feature_widths(observations)

    def jraph_path(params):
        nodes = network.apply(params, graph, widths, method=HAN.on_graph)
        return by_name(nodes[:-SPARE_NODES], observations)

    return lambda params: network.apply(params, observations), jraph_path


@pytest.mark.parametrize(("residual", "layers"), [(True, 2), (False, 2), (True, 3)])
def test_paths_and_their_gradients_are_equal(residual, layers):
    network = HAN(hidden=12, heads=3, layers=layers, residual=residual)
    observations = random_observation(0, 3)

    def loss(params, path):
        outputs = path(params)
        # Each number has a weight of its own, so that none can stand for another.
        return sum((x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)).sum() for x in outputs.values()), outputs

    params = random_params(network, observations)
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (dense_gradient, dense), (graph_gradient, graph) = (gradient(params, path) for path in paths(network, observations))
    assert_close(dense, graph, 1e-5)
    assert_close(dense_gradient, graph_gradient, 1e-4)


def assert_close(actual, expected, tolerance: float):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), actual, expected)


def test_padding_of_a_graph_changes_nothing():
    network = HAN(hidden=12, heads=3)
    obs = random_observation(1)
    graph, params = to_graphs_tuple(obs), random_params(network, obs)
    bigger = padded_graph(jax.tree.map(lambda x: x[None], obs))
    apply = on_graph(network)
    nodes, padded = apply(params, graph, feature_widths(obs)), apply(params, bigger, feature_widths(obs))
    assert_close(padded[:-SPARE_NODES], nodes, 1e-6)
    assert (padded[-SPARE_NODES:] == 0).all()


def test_graphs_can_be_vmapped():
    network = HAN(hidden=12, heads=3)
    observations = random_observation(2, 3)
    params, widths = random_params(network, observations), feature_widths(observations)
    graphs = jax.vmap(to_graphs_tuple)(observations)
    mapped = jax.jit(jax.vmap(lambda graph: network.apply(params, graph, widths, method=HAN.on_graph)))(graphs)
    assert_close(by_name(mapped, observations), jax.jit(network.apply)(params, observations), 1e-5)


def test_masked_slots_change_nothing():
    garbage = jnp.nan  # spreads wherever it is read
    network = HAN(hidden=12, heads=3)
    obs = random_observation(4, 2)
    slots = obs.running.shape[-2]

    def pad(features, mask):
        features = jnp.where(mask[..., None], features, garbage)
        extra = ((0, 0), (0, 0), (0, 3))
        return jnp.pad(features, (*extra, (0, 0)), constant_values=garbage), jnp.pad(mask, extra)

    running, running_mask = pad(obs.running, obs.running_mask)
    waiting, waiting_mask = pad(obs.waiting, obs.waiting_mask)
    padded = obs.replace(running=running, waiting=waiting, running_mask=running_mask, waiting_mask=waiting_mask)

    def loss(params, path):
        nodes = path(params)
        for queue in ("running", "waiting"):
            nodes[queue] = nodes[queue][:, :, :slots]
        return sum((x**2).sum() for x in nodes.values()), nodes

    params = random_params(network, obs)
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected_gradient, expected = gradient(params, paths(network, obs)[0])
    for path in paths(network, padded):
        actual_gradient, actual = gradient(params, path)
        assert_close(actual, expected, 1e-5)
        assert_close(actual_gradient, expected_gradient, 1e-3)
    assert (network.apply(params, padded)["running"][:, :, slots:] == 0).all()


def test_any_number_of_leading_axes():
    network = HAN(hidden=12, heads=3)
    batched = random_observation(5, 2, 3)
    params = random_params(network, batched)
    outputs = jax.jit(network.apply)(params, batched)
    alone = jax.jit(network.apply)(params, jax.tree.map(lambda x: x[1, 2], batched))
    assert_close(jax.tree.map(lambda x: x[1, 2], outputs), alone, 1e-5)


def test_empty_queues_give_finite_outputs_and_gradients():
    network = HAN(hidden=12, heads=3)
    empty = with_empty_queues(random_observation(6, 2))
    params = random_params(network, empty)
    for path in paths(network, empty):

        def loss(params, path=path):
            return sum((x**2).sum() for x in path(params).values())

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        assert np.isfinite(value)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_only_residual_lets_an_experts_own_features_reach_the_arrived_node():
    """The weakness of the paper's form (simulation.md section 5).

    The queues are empty: otherwise, in the paper's form too, an expert's features bend its attention over a queue.
    """
    obs = with_empty_queues(random_observation(7))
    loaded = obs.replace(expert=obs.expert.at[0].add(1.0))
    for residual in (True, False):
        network = HAN(hidden=12, heads=3, residual=residual)
        params, apply = random_params(network, obs), jax.jit(network.apply)
        change = jnp.abs(apply(params, loaded)["arrived"] - apply(params, obs)["arrived"]).max()
        assert change > 1e-2 if residual else change < 1e-5
