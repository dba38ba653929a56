"""The router's network: masks, symmetry, any number of experts, and finite numbers whatever is empty."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.agent.router_network import RouterNetwork
from tests.compiling import AS_USERS_GET
from tests.network_cases import random_observation, random_params, with_empty_queues


@pytest.fixture(scope="module")
def network() -> RouterNetwork:
    return RouterNetwork(hidden=16, heads=4, mlp=(16, 16))


@pytest.fixture(scope="module")
def params(network):
    return random_params(network, random_observation(0))


@pytest.fixture(scope="module")
def apply(network):
    return jax.jit(network.apply, static_argnames="method")


def test_shapes_and_batch_axes(apply, params):
    obs = random_observation(1, 2, 5)
    logits, q = apply(params, obs)
    assert logits.shape == (2, 5, 4) and q.shape == (2, 5, 2, 4)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x: apply(params, x))))(obs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), mapped, (logits, q))


def test_both_paths_of_the_encoder_give_the_same_from_the_same_weights(network, params, apply):
    by_graph = network.clone(encoder_path="jraph")
    obs = random_observation(8, 2, 3)
    assert jax.eval_shape(by_graph.init, jax.random.key(0), obs) == jax.eval_shape(network.init, jax.random.key(0), obs)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.jit(by_graph.apply)(params, obs), apply(params, obs))


def test_methods_compose_to_the_call(network, params):
    apply = jax.jit(network.apply, static_argnames="method", compiler_options=AS_USERS_GET)  # which all round alike
    obs = random_observation(2, 3)
    embedding = apply(params, obs, method="encode")
    heads = (apply(params, embedding, method=name) for name in ("policy", "critics"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), tuple(heads), apply(params, obs))


def test_forbidden_actions_have_probability_zero(apply, params):
    obs = random_observation(3)
    obs = obs.replace(action_mask=jnp.array([True, False, True, True]))
    logits, q = apply(params, obs)
    log_policy = jax.nn.log_softmax(logits)
    assert jax.nn.softmax(logits)[1] == 0
    assert np.isfinite((jnp.exp(log_policy) * log_policy).sum())
    assert np.isfinite(q).all()


def test_permuting_the_experts_permutes_the_outputs(apply, params):
    obs = random_observation(4, num_experts=5)
    order = jnp.array([3, 0, 4, 1, 2])
    actions = jnp.append(order, 5)
    permuted = jax.tree.map(lambda x: x[order], obs).replace(arrived=obs.arrived, action_mask=obs.action_mask[actions])
    logits, q = apply(params, obs)
    permuted_logits, permuted_q = apply(params, permuted)
    np.testing.assert_allclose(permuted_logits, logits[actions], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted_q, q[:, actions], rtol=1e-5, atol=1e-6)


def test_one_set_of_weights_serves_any_number_of_experts(network, apply, params):
    for num_experts in (1, 3, 6):
        logits, q = apply(params, random_observation(5, num_experts=num_experts))
        assert logits.shape == (num_experts + 1,) and q.shape == (2, num_experts + 1)
    shapes = jax.tree.map(
        jnp.shape, jax.eval_shape(network.init, jax.random.key(0), random_observation(5, num_experts=6))
    )
    assert shapes == jax.tree.map(jnp.shape, params)


def test_starts_near_uniform_with_twin_critics_that_differ(network, apply):
    obs = random_observation(6, 32)
    logits, q = apply(jax.jit(network.init)(jax.random.key(0), obs), obs)
    assert jnp.abs(jax.nn.softmax(logits) - 0.25).max() < 0.02
    assert 0 < jnp.abs(q).max() < 0.1
    assert jnp.abs(q[:, 0] - q[:, 1]).min() > 0


def test_empty_queues_give_finite_outputs_and_gradients(network, params):
    empty = with_empty_queues(random_observation(7, 2))

    def loss(params):
        logits, q = network.apply(params, empty)
        return (q**2).sum() + (jax.nn.log_softmax(logits) ** 2).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
