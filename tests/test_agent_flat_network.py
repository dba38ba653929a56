"""The network without a graph has the interface of the router's network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.agent.flat_network import FlatNetwork
from tests.network_cases import random_observation, random_params


def test_every_feature_reaches_the_outputs_and_masks_hold():
    network, obs = FlatNetwork(mlp=(16, 8)), random_observation(1, 2, 5)
    params, apply = random_params(network, obs), jax.jit(network.apply)
    logits, q = apply(params, obs)
    assert logits.shape == (2, 5, 4) and q.shape == (2, 5, 2, 4)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x: network.apply(params, x))))(obs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), mapped, (logits, q))
    barred = obs.replace(action_mask=obs.action_mask.at[..., 1].set(False))
    assert (jax.nn.softmax(apply(params, barred)[0])[..., 1] == 0).all()

    def first_q(features: jax.Array) -> jax.Array:
        return network.apply(params, obs.replace(running=features))[1].sum()

    assert (jnp.abs(jax.jit(jax.grad(first_q))(obs.running)) > 0).any(axis=(0, 1)).all()


def test_actor_and_critics_share_nothing():
    network, obs = FlatNetwork(mlp=(16,)), random_observation(2, 3)
    loss = lambda params: jnp.square(network.apply(params, obs)[1] - 1).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(random_params(network, obs))["params"]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["actor"]))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient["critic"]))
