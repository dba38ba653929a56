"""The environment's contract (docs/environment.md): figures on record, devices, float64, views, spaces, copies."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.environment.few_slots import FEW_SLOTS
from jaxroute.environment.metrics import EpisodeTotals
from jaxroute.environment.observation import GraphObservation
from jaxroute.environment.spaces import Box, Dict, Discrete
from jaxroute.environment.wrappers import FiveValues
from jaxroute.testing import check_env
from tests.compiling import compile_fast
from tests.record_dynamics import CASES, EPISODE, RECORD, STEPS, recorded, rollout
from tests.rollouts import CHEAP_COMPILE

# JAX 0.10 and 0.12, with and without optimisation, agree to 1e-5 of a time, or to 1e-7 s where a clock near 0 is the
# difference of two times. Float32 rounds a time of 16 s to 2e-6 s.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def small(**options):
    return jaxroute.make("paper-3", slots=5, queue_nodes=2, episode_length=40, **options)


@functools.cache
def run_of(name: str) -> tuple[Any, ...]:
    """(observation, state, reward, done, info) of a case on record, as it is now."""
    return rollout(CASES[name])


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, np.ndarray]]:
    """The arrays on record by case and name."""
    cases: dict[str, dict[str, np.ndarray]] = {name: {} for name in CASES}
    with np.load(RECORD) as arrays:
        for key in arrays:
            name, _, field = key.partition("/")
            cases[name][field] = arrays[key]
    return cases


@pytest.fixture(scope="module")
def run():
    return run_of("vllm_v1")


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_on_record(record, name):
    message = "the environment's results changed: if that is meant, raise DYNAMICS_VERSION and record them anew"
    assert DYNAMICS_VERSION == 3, message
    got, wanted = recorded(run_of(name)), record[name]
    assert got.keys() == wanted.keys()
    for field, value in wanted.items():
        close = CLOSE if np.issubdtype(value.dtype, np.floating) else {"rtol": 0, "atol": 0}
        assert got[field].dtype == value.dtype, field
        np.testing.assert_allclose(got[field], value, err_msg=f"{field}: {message}", **close)


@pytest.mark.parametrize("name", CASES)
def test_everything_happens_in_what_is_on_record(record, name):
    episode = {
        field: record[name][f"episode.{field}"][EPISODE - 1]
        for field in EpisodeTotals.__dataclass_fields__
        if field not in ("timing_record", "cost", "abandoned")  # the latter in test_environment_qos.py
    }
    for field, value in episode.items():
        assert (value > 0).any() or (name, field) == ("orca", "preemptions"), field
    assert (episode["dropped"] > 0).all() and (episode["drained_qos"] > 0).all()
    assert ((episode["completed"] > episode["violations"]) & (episode["violations"] > 0)).any(axis=1).all()
    assert (episode["completed"] > 0).all(), "every expert serves"
    assert ((record[name]["info.penalty"] > 0).sum(axis=0) > 1).all()
    assert ((record[name]["info.qos"] > 0).sum(axis=0) > 3).all()
    longest = record[name]["engines.num_requests"].max(axis=(1, 2))
    assert (longest < FEW_SLOTS).sum() > 4 and (longest >= FEW_SLOTS).sum() > 4


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
    assert isinstance(space, Dict) and isinstance(vector, Box) and vector.shape == (141,)
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
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = compile_fast() | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "XLA_FLAGS": flags}
    ran = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
