"""gymnasium's adapters: its checker passes, and many environments do what its `SyncVectorEnv` of single ones does."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxroute import adapters
from jaxroute.errors import UserError
from tests.adapting import EPISODE, cheap, equal, small  # noqa: F401  a fixture

gymnasium = pytest.importorskip("gymnasium", reason="the extra gymnasium is not installed")


@pytest.mark.parametrize("obs", ["flat", "graph"])
def test_gymnasiums_own_checker(obs):
    from gymnasium.utils.env_checker import check_env

    env = adapters.to_gymnasium(*small(obs))
    assert isinstance(env, gymnasium.Env)
    assert isinstance(env.action_space, gymnasium.spaces.Discrete) and env.action_space.n == 4
    assert isinstance(env.observation_space, gymnasium.spaces.Box if obs == "flat" else gymnasium.spaces.Dict)
    with pytest.warns(UserWarning) as warnings:
        check_env(env)
    for warning in warnings:  # features without a bound, and no render modes
        assert "infinity" in str(warning.message) or "render" in str(warning.message)


def test_an_episode_ends_by_truncation_and_needs_a_reset():
    env = adapters.to_gymnasium(*small())
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    observation, info = env.reset(seed=3)
    assert info["action_mask"].dtype == np.int8 and env.action_space.sample(info["action_mask"]) in range(4)
    for step in range(EPISODE):
        before, (observation, reward, terminated, truncated, info) = observation, env.step(step % 3)
        assert (terminated, truncated) == (False, step == EPISODE - 1)
        assert isinstance(reward, float) and ("metrics" in info) == truncated
        assert not np.array_equal(before, observation)
    assert 0 <= info["metrics"]["qos"] <= 1
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    first, _ = env.reset()
    assert not np.array_equal(first, observation)  # which was the episode's last
    np.testing.assert_array_equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
    assert not np.array_equal(env.reset()[0], env.reset(seed=4)[0])


# One row shares its programs with the other tests.
@pytest.mark.parametrize(("obs", "rows"), [("flat", 2), ("graph", 1)])
def test_the_vector_environment_is_gymnasiums_over_single_ones(obs, rows):
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    steps = 2 * EPISODE + 1
    single = [lambda: adapters.to_gymnasium(*small(obs))] * rows
    oracle = SyncVectorEnv(single, autoreset_mode=AutoresetMode.SAME_STEP)
    vector = adapters.to_gymnasium_vector(*small(obs), num_envs=rows)
    assert isinstance(vector, gymnasium.vector.VectorEnv)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert vector.observation_space == oracle.observation_space and vector.action_space == oracle.action_space
    equal(vector.reset(seed=7)[0], oracle.reset(seed=7)[0])
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        actions = generator.integers(4, size=rows)
        ours, theirs = vector.step(actions), oracle.step(actions)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other)
        assert theirs[-1].keys() <= ours[-1].keys()
        assert ours[0] in vector.observation_space
        assert ("final_obs" in ours[-1]) == (step % EPISODE == 0) and not ours[2].any()
        if step == EPISODE + 1:  # copies of whatever state go on alike
            copies = [pickle.loads(pickle.dumps(vector)), copy.deepcopy(vector)]
            following = np.arange(rows)
            one, other = (copied.step(following) for copied in copies)
            equal(one[0], other[0])


def test_seeds_of_the_vector_environment():
    vector = adapters.to_gymnasium_vector(*small(), num_envs=2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step(np.zeros(2, int))
    one, other = vector.reset(seed=1)[0], vector.reset(seed=[1, 2])[0]
    np.testing.assert_array_equal(one, other)
    drawn = vector.reset(seed=1) and vector.reset()[0]
    assert not np.array_equal(drawn, one)
    np.testing.assert_array_equal(drawn, vector.reset(seed=1) and vector.reset()[0])
    one[:] = 0  # its arrays are the caller's
    np.testing.assert_array_equal(vector.reset(seed=1)[0], other)


def test_jaxroute_imports_no_adapter():
    program = (
        "import sys, jaxroute; import jaxroute.adapters; "
        "assert not {'gymnasium', 'gymnax', 'stable_baselines3', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_package_is_one_line(monkeypatch):
    for name in ("gymnax", "stable_baselines3"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"jaxroute.adapters.{name}", raising=False)
    with pytest.raises(UserError, match=r"needs the package gymnax.*: pip install 'jaxroute\[gymnax\]'"):
        adapters.to_gymnax(None, None)
    with pytest.raises(UserError, match=r"needs the package stable_baselines3.*: pip install 'jaxroute\[sb3\]'"):
        adapters.to_stable_baselines3(None, None, 1)
