"""Stable-Baselines3's `VecEnv`. Not in the extra dev, since it needs torch: `make compat` tests it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from jaxroute import adapters
from tests.adapting import ACTIONS, EPISODE, Calls, call_at_random, cheap, equal, small  # noqa: F401  a fixture

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not in the extra dev; make compat tests it")
from stable_baselines3 import DQN, PPO  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor  # noqa: E402

ROWS = 2


def dummy(obs):
    """Stable-Baselines3's vector environment over single ones, and ours."""
    oracle = DummyVecEnv([lambda: adapters.to_gymnasium(*small(obs))] * ROWS)
    return oracle, adapters.to_stable_baselines3(*small(obs), ROWS)


def step(vec, actions):
    """What a step returns, and then the masks of the observations, which are also in our infos."""
    observation, reward, done, infos = vec.step(actions)
    for info, ended, after in zip(infos, done, vec.reset_infos, strict=True):
        info["action_mask"] = (after if ended else info)["action_mask"].copy()
    return observation, reward, done, infos, copy.deepcopy(vec.reset_infos)


def test_a_graph_is_a_dict():
    oracle, vec = dummy("graph")
    assert isinstance(vec, VecEnv) and vec.observation_space == oracle.observation_space
    assert vec.action_space == oracle.action_space and vec.seed(5) == oracle.seed(5) == [5, 6]
    equal(vec.reset(), dict(oracle.reset()))
    for _ in range(EPISODE):
        answers = [step(each, np.array([1, 0])) for each in (vec, oracle)]
        equal(answers[0], answers[1])
    assert answers[0][2].all() and {"terminal_observation", "metrics"} <= answers[0][3][1].keys()


def test_random_calls_are_answered_as_stable_baselines3_answers_them():
    class OfStableBaselines3(Calls):
        def __init__(self):
            super().__init__()
            self.theirs, self.ours = dummy("flat")
            self.seeded = self.started = False

        @rule(seed=st.none() | st.integers(0, 2**40), of_numpy=st.integers(0, 9))
        def seed(self, seed, of_numpy):
            def call(vec):
                np.random.seed(of_numpy)  # seeds of None are drawn by it
                return vec.seed(seed)

            self.seeded = self.both(call)

        @precondition(lambda self: self.seeded)  # seeds are the operating system's without
        @rule()
        def reset(self):
            self.started = self.both(lambda vec: (vec.reset(), copy.deepcopy(vec.reset_infos)))
            assert self.started

        @rule(seed=st.sampled_from([np.int64(3), -1]))
        def reset_in_vain(self, seed):
            assert not self.both(lambda vec: (vec.seed(seed), vec.reset()))
            self.both(lambda vec: vec.seed(1))
            self.seeded = True

        @rule(options=st.sampled_from([None, {}, {"nothing": 1}, [{"nothing": 1}, {}]]))
        def set_options(self, options):
            self.both(lambda vec: vec.set_options(options))

        @rule(actions=ACTIONS)
        def step(self, actions):
            assert self.both(lambda vec: step(vec, actions)) == self.started

    call_at_random(OfStableBaselines3)


def test_attributes_and_methods():
    env, params = small()
    vec = adapters.to_stable_baselines3(env, params, ROWS)
    vec.reset()
    assert vec.get_attr("episode_length") == [EPISODE] * ROWS and vec.get_attr("render_mode", 1) == [None]
    assert vec.has_attr("action_masks") and not vec.has_attr("nothing")
    masks = vec.env_method("action_masks", indices=[0])
    assert len(masks) == 1 and masks[0].dtype == bool and masks[0].shape == (4,)
    assert vec.env_is_wrapped(VecMonitor) == [False] * ROWS
    heavier = params.replace(penalty_weight=params.penalty_weight * 2)
    vec.set_attr("params", heavier)
    assert vec.get_attr("params")[1] is heavier
    for name, indices in (("params", 0), ("episode_length", None)):
        with pytest.raises(AttributeError, match="only params can"):
            vec.set_attr(name, 1, indices)
    with pytest.raises(AttributeError):
        vec.env_method("render")
    vec.seed(1)
    first = vec.reset()
    vec.seed(1)
    np.testing.assert_array_equal(first, vec.reset())
    assert not np.array_equal(first, vec.reset())
    vec.close()


def test_agents_learn_on_it():
    vec = VecMonitor(adapters.to_stable_baselines3(*small(), ROWS))
    agent = DQN("MlpPolicy", vec, learning_starts=4, buffer_size=64, batch_size=4, seed=0).learn(40)
    assert agent.replay_buffer.timeouts.sum() == agent.replay_buffer.dones.sum() == 20 // EPISODE * ROWS
    graph = adapters.to_stable_baselines3(*small("graph"), ROWS)
    PPO("MultiInputPolicy", graph, n_steps=8, batch_size=8, n_epochs=1).learn(16)
