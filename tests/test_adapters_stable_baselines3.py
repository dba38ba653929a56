"""Stable-Baselines3's `VecEnv`. Not in the extra dev, since it needs torch: `make compat` tests it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from jaxroute import adapters
from tests.adapting import EPISODE, cheap, equal, small  # noqa: F401  a fixture

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not in the extra dev; make compat tests it")
from stable_baselines3 import DQN, PPO  # noqa: E402
from stable_baselines3.common.vec_env import VecEnv, VecMonitor  # noqa: E402

ROWS = 2


@pytest.mark.parametrize("obs", ["flat", "graph"])
def test_steps_are_those_of_gymnasiums_vector_environment(obs):
    vec, vector = (make(*small(obs), ROWS) for make in (adapters.to_stable_baselines3, adapters.to_gymnasium_vector))
    assert isinstance(vec, VecEnv) and vec.observation_space == vector.single_observation_space
    assert vec.seed(5) == [5, 6]
    equal(vec.reset(), vector.reset(seed=5)[0])
    assert vec.reset_infos[1]["action_mask"].shape == (4,)
    for step in range(1, 2 * EPISODE + 2):
        actions = np.array([step % 3, 0])
        observation, reward, done, infos = vec.step(actions)
        *wanted, terminated, truncated, info = vector.step(actions)
        equal(observation, wanted[0])
        equal(reward, wanted[1])
        assert done.tolist() == [step % EPISODE == 0] * ROWS
        for row, own in enumerate(infos):
            np.testing.assert_array_equal(own["action_mask"], info["action_mask"][row])
            assert own["TimeLimit.truncated"] == truncated[row] and not terminated[row]
            assert ("terminal_observation" in own) == done[row]
            if done[row]:
                equal(own["terminal_observation"], info["final_obs"][row])
                assert own["metrics"]["qos"] == info["final_info"]["metrics"]["qos"][row]
                assert own["qos"] == info["final_info"]["qos"][row]
        if step == EPISODE + 1:
            one, other = (copied.step(actions)[0] for copied in (copy.deepcopy(vec), pickle.loads(pickle.dumps(vec))))
            equal(one, other)


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
