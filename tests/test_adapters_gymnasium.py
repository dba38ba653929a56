"""gymnasium's adapters: its checker passes, and many environments do what its `SyncVectorEnv` of single ones does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from jaxroute import adapters
from jaxroute.errors import UserError
from tests.adapting import ACTIONS, EPISODE, Calls, call_at_random, cheap, equal, small  # noqa: F401  a fixture
from tests.compiling import compile_fast

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


def sync(obs, rows):
    """gymnasium's vector environment over single ones, and ours."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    single = [lambda: adapters.to_gymnasium(*small(obs))] * rows
    oracle = SyncVectorEnv(single, autoreset_mode=AutoresetMode.SAME_STEP)
    return oracle, adapters.to_gymnasium_vector(*small(obs), num_envs=rows)


# One row shares its programs with the other tests.
@pytest.mark.parametrize(("obs", "rows"), [("flat", 2), ("graph", 1)])
def test_the_vector_environment_is_gymnasiums_over_single_ones(obs, rows):
    oracle, vector = sync(obs, rows)
    assert isinstance(vector, gymnasium.vector.VectorEnv)
    assert vector.metadata["autoreset_mode"] == oracle.autoreset_mode
    assert vector.observation_space == oracle.observation_space and vector.action_space == oracle.action_space
    equal(vector.reset(seed=7), oracle.reset(seed=7))
    assert vector.np_random_seed == oracle.np_random_seed and vector.np_random == vector.np_random
    for step in range(1, 2 * EPISODE + 2):
        actions = np.arange(rows) + step % 3
        ours, theirs = vector.step(actions), oracle.step(actions)
        equal(ours, theirs)
        assert theirs[-1].keys() <= ours[-1].keys()
        assert ours[0] in vector.observation_space
        assert ("final_obs" in ours[-1]) == (step % EPISODE == 0) and not ours[2].any()


def test_random_calls_are_answered_as_gymnasium_answers_them():
    seed = st.none() | st.integers(0, 2**40)
    # Those that gymnasium refuses at the first environment, so that nothing happens.
    wrong = st.sampled_from([[], [1], [1, 2, 3], [-1, 1], [np.int64(1), 1], ["1", 1], -1, 1.5, "ab"])

    class OfGymnasium(Calls):
        def __init__(self):
            super().__init__()
            self.theirs, self.ours = sync("flat", 2)
            self.seeded = np.zeros(2, bool)  # a row without a seed draws from the operating system
            self.started = False

        @rule(seeds=st.integers(0, 2**40) | st.none() | st.lists(seed, min_size=2, max_size=2))
        def reset(self, seeds):
            if seeds is None and not self.seeded.all():
                return
            if isinstance(seeds, list):
                seeds = [3 if own is None and not done else own for own, done in zip(seeds, self.seeded, strict=True)]
            self.started = self.both(lambda env: env.reset(seed=seeds))
            self.seeded[:] = True

        @rule(seeds=wrong)
        def reset_in_vain(self, seeds):
            assert not self.both(lambda env: env.reset(seed=seeds))

        @precondition(lambda self: self.started)
        @rule(seeds=st.none() | st.lists(seed, min_size=2, max_size=2), first=st.booleans(), second=st.booleans())
        def reset_some(self, seeds, first, second):
            mask = np.array([first, second])
            self.both(lambda env: env.reset(seed=seeds, options={"reset_mask": mask}))

        @rule(actions=ACTIONS)
        def step(self, actions):
            assert self.both(lambda env: env.step(actions)) == self.started

        @rule()
        def look_at_seeds(self):
            if self.seeded.all():
                self.both(lambda env: env.np_random_seed)

    call_at_random(OfGymnasium)


def test_actions_and_seeds_are_whole_numbers():
    vector = adapters.to_gymnasium_vector(*small(), num_envs=2)
    with pytest.raises(gymnasium.error.ResetNeeded, match="all environments"):
        vector.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gymnasium.error.Error, match="must be a python integer"):
        vector.reset(seed=np.int64(1))
    one, _ = vector.reset(seed=1)
    for wrong in ([0], [0, 1, 2], [0.0, 1.0], [0.5, 1.0], [None, 1], ["0", "1"], [True, False]):
        with pytest.raises(ValueError, match="a whole number for each of 2 environments"):
            vector.step(wrong)
    answers = []
    for dropped in ([3, 3], [2**32, -(2**31)], np.array([255, 3], np.uint8), np.array([2**63, 3], np.uint64)):
        np.testing.assert_array_equal(vector.reset(seed=1)[0], one)
        answers.append(vector.step(dropped)[0])
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])
    one[:] = 0  # its arrays are the caller's
    assert vector.reset(seed=1)[0].any()


def test_a_forked_worker_is_an_error_and_a_spawned_one_works():
    program = """
import numpy, sys
import jaxroute
from gymnasium.vector import AsyncVectorEnv
from jaxroute.adapters import to_gymnasium

if __name__ == "__main__":
    made = jaxroute.make("paper-3", obs="flat", slots=3, episode_length=4, penalty="off", metrics="off")
    envs = AsyncVectorEnv([lambda: to_gymnasium(*made)], context=sys.argv[1])
    try:
        envs.reset(seed=1)
    except jaxroute.UserError as error:
        assert "is a fork" in str(error) and "context='spawn'" in str(error)
        envs.close(terminate=True)
    else:
        envs.step(numpy.zeros(1, int))
        envs.close()
        print("stepped")
"""
    for context, output in (("fork", ""), ("spawn", "stepped\n")):
        run = [sys.executable, "-W", "ignore", "-c", program, context]
        done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120, env=compile_fast())
        assert done.stdout == output


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
