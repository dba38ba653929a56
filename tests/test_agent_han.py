"""The attention network: equal to PyTorch Geometric's, and its two paths equal to each other."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from jaxroute.agent.graph import to_graphs_tuple
from jaxroute.agent.han import HAN
from jaxroute.agent.node_types import EDGE_TYPES, NODE_TYPES, feature_widths
from jaxroute.environment.observation import GraphObservation
from tests.network_cases import random_observation, random_params, with_empty_queues, with_whole_queues
from tests.rollouts import CHEAP_COMPILE

REFERENCE = Path(__file__).parent / "data" / "han_reference" / "han_two_layers.npz"
SLOTS = 6  # more than the reference's longest queue: some slots are padding
SPARE_NODES = 7  # of a padded graph

jit = functools.partial(jax.jit, compiler_options=CHEAP_COMPILE)


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
        nodes = jit(network.apply)(reference_params(reference), obs)
    else:
        nodes = by_name(
            on_graph(network)(reference_params(reference), to_graphs_tuple(obs), feature_widths(obs), 3), obs
        )
    for queue in ("running", "waiting"):
        nodes[queue] = nodes[queue][queue_places(reference, queue)]
    for name in NODE_TYPES:
        actual = np.atleast_2d(nodes[name])
        np.testing.assert_allclose(actual, reference[f"{output}_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


def on_graph(network: HAN):
    return jit(functools.partial(network.apply, method=HAN.on_graph), static_argnums=(2, 3))


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
    convert = jit(to_graphs_tuple)
    graph = jraph.batch([convert(jax.tree.map(lambda x, i=i: x[i], observations)) for i in range(size)])
    nodes, edges = len(graph.nodes["type"]), len(graph.senders)
    return jraph.pad_with_graphs(graph, nodes + SPARE_NODES, edges + 5, size + 2)


def paths(network: HAN, observations: GraphObservation):
    """Both ways from parameters to embeddings by node type."""
    graph, widths = padded_graph(observations), feature_widths(observations)
    num_experts = observations.running_mask[..., 0].size

    def jraph_path(params):
        nodes = network.apply(params, graph, widths, num_experts, method=HAN.on_graph)
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
    gradient = jit(jax.grad(loss, has_aux=True), static_argnums=1)
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
    nodes, padded = (apply(params, x, feature_widths(obs), 3) for x in (graph, bigger))
    assert_close(padded[:-SPARE_NODES], nodes, 1e-6)
    assert (padded[-SPARE_NODES:] == 0).all()


def test_graphs_can_be_vmapped():
    network = HAN(hidden=12, heads=3)
    observations = random_observation(2, 3)
    params, widths = random_params(network, observations), feature_widths(observations)
    graphs = jax.vmap(to_graphs_tuple)(observations)
    mapped = jit(jax.vmap(lambda graph: network.apply(params, graph, widths, 3, method=HAN.on_graph)))(graphs)
    assert_close(by_name(mapped, observations), jit(network.apply)(params, observations), 1e-5)


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
    gradient = jit(jax.grad(loss, has_aux=True), static_argnums=1)
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
    outputs = jit(network.apply)(params, batched)
    alone = jit(network.apply)(params, jax.tree.map(lambda x: x[1, 2], batched))
    assert_close(jax.tree.map(lambda x: x[1, 2], outputs), alone, 1e-5)


def embeddings_both_ways(network: HAN):
    """Embeddings [B, 1 + N, hidden] of arrived nodes and experts: on the dense path, and by parts of the batch."""

    def dense(params, obs):
        nodes = network.apply(params, obs)
        embedded = jnp.concatenate([nodes["arrived"][..., None, :], nodes["expert"]], axis=-2)
        return embedded.reshape(-1, *embedded.shape[-2:])

    return dense, lambda params, obs: network.apply(params, obs, method=HAN.embed_by_graph)


def gradients_both_ways(network: HAN):
    """For each way, (params, features by name, obs) -> gradients for params and features, and the embeddings."""

    def gradient(embed):
        def loss(params, features, obs):
            output = embed(params, obs.replace(**features))
            # Each number has a weight of its own, so that none can stand for another.
            return (output * jnp.sin(jnp.arange(output.size)).reshape(output.shape)).sum(), output

        return jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    return map(gradient, embeddings_both_ways(network))


@pytest.mark.parametrize(("num_experts", "batch", "whole"), [(1, (4,), True), (3, (2, 5), False), (6, (), False)])
def test_embedding_by_graph_is_the_dense_path(num_experts, batch, whole):
    network = HAN(hidden=12, heads=3, layers=1)
    dense, by_graph = gradients_both_ways(network)
    random = random_observation(8, *batch, num_experts=num_experts, slots=7)
    full = jax.tree.map(lambda x: jnp.ones_like(x) if x.dtype == bool else x, random)  # takes several parts
    params = random_params(network, random)
    for obs in (random, full, with_empty_queues(random)):
        obs = with_whole_queues(obs) if whole else obs
        masks = {"running": obs.running_mask, "waiting": obs.waiting_mask}
        masks = {"queued": masks["running"] | masks["waiting"]} if whole else masks
        features = {name: getattr(obs, name) for name in ("arrived", "expert", *masks)}
        garbage = {name: jnp.where(mask[..., None], features[name], jnp.nan) for name, mask in masks.items()}
        expected_gradient, expected = dense(params, features, obs)
        gradient, output = by_graph(params, {**features, **garbage}, obs)
        assert output.shape == (np.prod(batch, dtype=int), 1 + num_experts, 12)
        assert_close(output, expected, 1e-5)
        assert_close(gradient, expected_gradient, 1e-4)


def test_embedding_by_graph_can_be_vmapped_over_observations_and_weights():
    network = HAN(hidden=12, heads=3, layers=1)
    obs = random_observation(9, 2, 3)
    params = random_params(network, obs)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)

    def squares(embed, params, obs):
        output = embed(params, obs)
        return (output**2).sum(), output

    dense, by_graph = (
        jit(jax.vmap(jax.grad(functools.partial(squares, embed), has_aux=True)))(both, obs)
        for embed in embeddings_both_ways(network)
    )
    assert_close(by_graph, dense, 1e-4)
    one_by_one = jit(jax.vmap(embeddings_both_ways(network)[1], (None, 0)))(params, jax.tree.map(lambda x: x[0], obs))
    assert_close(one_by_one[:, 0], dense[1][0], 1e-5)


def test_empty_queues_give_finite_outputs_and_gradients():
    network = HAN(hidden=12, heads=3)
    empty = with_empty_queues(random_observation(6, 2))
    params = random_params(network, empty)
    for path in paths(network, empty):

        def loss(params, path=path):
            return sum((x**2).sum() for x in path(params).values())

        value, gradient = jit(jax.value_and_grad(loss))(params)
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
        params, apply = random_params(network, obs), jit(network.apply)
        change = jnp.abs(apply(params, loaded)["arrived"] - apply(params, obs)["arrived"]).max()
        assert change > 1e-2 if residual else change < 1e-5
