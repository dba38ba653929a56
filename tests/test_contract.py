"""The environment's contract (docs/environment.md): figures on record, devices, float64, views, spaces, copies."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.environment.observation import GraphObservation
from jaxroute.environment.spaces import Box, Dict, Discrete
from jaxroute.environment.wrappers import FiveValues
from jaxroute.testing import check_env
from tests.rollouts import CHEAP_COMPILE

EPISODE, STEPS = 25, 60
ON_RECORD = {
    "reward": [18.9119, 14.7646],
    "penalty": [0.0, 1.436],
    "elapsed": [11.443, 10.6909],
    "expert features": [481.6534, 564.3169],
    "running features": [593.7809, 710.6965],
    "output tokens": [15278.0, 15680.0],
    "scores": [125.4883, 126.1209],
    "QoS of episodes": [171.8496, 176.6453],
}
"""Of `DYNAMICS_VERSION`: sums over the steps, for each of the environments."""


def small(**options):
    return jaxroute.make("paper-3", slots=5, queue_nodes=2, episode_length=EPISODE, **options)


@pytest.fixture(scope="module")
def run():
    """60 decisions, so two ends of episodes, in two environments: (observation, state, reward, done, info)."""
    env, params = small()
    arrivals = params.workload.arrivals.replace(rate=jnp.asarray(5.0))
    params = params.replace(workload=params.workload.replace(arrivals=arrivals))

    def step(state, index):
        keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(1), 2), index)
        actions = (index + jnp.arange(2, dtype=jnp.int32) * index // 3) % env.num_actions
        values = jax.vmap(FiveValues(env).step, (0, 0, 0, None))(keys, state, actions, params)
        return values[1], values

    def rollout(params):
        _, state = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(0), 2), params)
        return jax.lax.scan(step, state, jnp.arange(STEPS, dtype=jnp.int32))[1]

    return jax.device_get(jax.jit(rollout, compiler_options=CHEAP_COMPILE)(params))


def test_results_are_those_on_record(run):
    observation, state, reward, _, info = run
    figures = {
        "reward": reward,
        "penalty": info["penalty"],
        "elapsed": info["elapsed"],
        "expert features": observation.expert,
        "running features": observation.running,
        "output tokens": state.request.output_tokens,
        "scores": state.request.score,
        "QoS of episodes": info["episode"].qos,
    }
    sums = {
        name: np.sum(values, axis=(0, *range(2, values.ndim)), dtype=np.float64) for name, values in figures.items()
    }
    message = "the environment's results changed: if that is meant, raise DYNAMICS_VERSION and record these:\n"
    message += f"{ {name: np.round(value, 4).tolist() for name, value in sums.items()} }"
    assert DYNAMICS_VERSION == 1 and sums.keys() == ON_RECORD.keys(), message
    for name, value in sums.items():
        assert np.allclose(value, ON_RECORD[name], rtol=1e-3, atol=1e-3), message


def test_truncation_is_no_termination(run):
    *_, done, info = run
    ends = (np.arange(STEPS) + 1) % EPISODE == 0
    np.testing.assert_array_equal(done.T, [ends, ends])
    np.testing.assert_array_equal(info["truncated"], done)
    assert not info["terminated"].any() and (info["discount"] == 1).all()
    assert info["discount"].dtype == np.float32


def test_final_observation_and_info_are_of_the_episode_that_ends(run):
    observation, _, _, done, info = run
    same = [
        np.isclose(one, other).reshape(STEPS, 2, -1).all(axis=2)
        for one, other in zip(jax.tree.leaves(observation), jax.tree.leaves(info["final_observation"]), strict=True)
    ]
    np.testing.assert_array_equal(np.all(same, axis=0), ~done)
    assert (info["episode"].arrived[done] == EPISODE).all()
    assert (info["episode"].arrived[EPISODE] == 1).all()
    assert not observation.running_mask[done].any() and info["final_observation"].running_mask[done].any()


def test_the_environment_keeps_its_contract():
    env, params = small(obs="flat", metrics="off", penalty="off")
    check_env(env, params)


def test_spaces():
    graph, flat = (small(obs=obs)[0] for obs in ("graph", "flat"))
    space, vector, actions = graph.observation_space(), flat.observation_space(), graph.action_space()
    assert isinstance(space, Dict) and isinstance(vector, Box) and vector.shape == (123,)
    assert space == small()[0].observation_space() and space != vector and vector.dtype == np.float32
    bounded = Box([-jnp.inf, 0, 1], [0, jnp.inf, 2], (3,))

    def sampled(key):
        sample, keys = space.sample(key), jax.random.split(key, 100)
        inside = [
            space.contains(sample),
            vector.contains(vector.sample(key)),
            jnp.all(jax.vmap(bounded.contains)(jax.vmap(bounded.sample)(keys))),
            actions.contains(jnp.int32(3)),
        ]
        outside = [
            space.contains(sample.replace(arrived=sample.arrived * jnp.nan)),
            space.contains(sample.replace(expert=sample.expert + 2)),
            space.contains({"arrived": sample.arrived}),
            vector.contains(jnp.zeros(122)),
            vector.contains(np.zeros(123)),
            actions.contains(jnp.int32(4)),
            actions.contains(1.0),
        ]
        return sample, inside, outside, jax.vmap(actions.sample)(keys)

    sample, inside, outside, drawn = jax.jit(sampled, compiler_options=CHEAP_COMPILE)(jax.random.key(0))
    assert isinstance(sample, GraphObservation) and all(inside) and not any(outside)
    assert actions == Discrete(4) and set(drawn.tolist()) == {0, 1, 2, 3}


def test_wrappers_are_values():
    five = FiveValues(small()[0])
    for other in (pickle.loads(pickle.dumps(five)), copy.deepcopy(five), FiveValues(small()[0])):
        assert other == five and hash(other) == hash(five)
    assert five.num_actions == 4 and five != FiveValues(small(drop=False)[0])
    with pytest.raises(AttributeError):
        _ = five.nothing


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, jaxroute
from jax.sharding import Mesh, PartitionSpec

env, params = jaxroute.make("paper-3", slots=4, queue_nodes=1, episode_length=3, metrics="off", penalty="off")


def rollout(keys, params):
    _, state = jax.vmap(env.reset, (0, None))(keys, params)

    def step(state, index):
        actions = jnp.full(keys.shape[0], index % 3)
        observation, state, reward, _, _, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, actions, params)
        return state, (observation.expert, reward)

    return jax.lax.scan(step, state, jnp.arange(8, dtype=jnp.int32))[1]


keys = jax.random.split(jax.random.key(0), 4)
mesh = Mesh(np.array(jax.devices()), ("devices",))
spread = PartitionSpec("devices")
sharded = jax.shard_map(
    rollout, mesh=mesh, in_specs=(spread, PartitionSpec()), out_specs=PartitionSpec(None, "devices"), check_vma=False
)
results = jax.jit(sharded)(keys, params)
mapped = jax.pmap(rollout, in_axes=(0, None))(keys.reshape(2, 2), params)
for one, other in zip(results, mapped):
    assert len(one.sharding.device_set) == len(other.sharding.device_set) == 2
    other = np.moveaxis(np.asarray(other), 0, 1).reshape(one.shape)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
assert results[0].dtype == np.float32 and results[1].dtype == np.float64 and results[1].sum() > 0
"""


@pytest.mark.slow
def test_two_devices_and_float64():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    ran = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
