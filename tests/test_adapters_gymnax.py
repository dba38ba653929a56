"""gymnax's adapter, whichever gymnax there is: `make compat` has one environment for 0.0.9 and one for 1.x.

Not in the extra dev: gymnax 1.0 wants a JAX below 0.12, which the suite also runs on.
"""

from __future__ import annotations

import copy
import pickle
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from jaxroute import adapters
from tests.adapting import ACTIONS, EPISODE, Calls, call_at_random, small
from tests.rollouts import CHEAP_COMPILE

pytest.importorskip("gymnax", reason="gymnax is not in the extra dev; make compat tests it")
from gymnax.environments import environment, spaces  # noqa: E402
from gymnax.wrappers.purerl import LogWrapper  # noqa: E402

STEPS = 2 * EPISODE + 1


@pytest.fixture(scope="module")
def adapted():
    return adapters.to_gymnax(*small())


def run(step, state, params):
    """`step`'s values over `STEPS` steps, each leaf [STEPS, ...]."""

    def one(state, index):
        values = step(jax.random.fold_in(jax.random.key(1), index), state, index % 3, params)
        return values[1], values

    program = jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(STEPS)), compiler_options=CHEAP_COMPILE)
    return jax.device_get(program(state)[1])


def test_classes_and_spaces_are_gymnaxs(adapted):
    env, params = adapted
    assert isinstance(env, environment.Environment) and isinstance(params, environment.EnvParams)
    assert params.max_steps_in_episode == EPISODE and env.num_actions == 4 and env.default_params is params
    assert isinstance(env.action_space(params), spaces.Discrete) and env.action_space(params).n == 4
    space = env.observation_space(params)
    observation, state = env.reset(jax.random.key(0))
    assert isinstance(space, spaces.Box) and space.shape == observation.shape
    assert space.contains(observation) and space.contains(space.sample(jax.random.key(1)))
    np.testing.assert_allclose(env.get_obs(state, params), observation, rtol=1e-5)  # not compiled
    graph, _ = adapters.to_gymnax(*small("graph"))
    assert isinstance(graph.observation_space(params), spaces.Dict)
    assert all(isinstance(part, spaces.Box) for part in graph.observation_space(params).spaces.values())


def test_steps_are_the_environments_own(adapted):
    env, params = adapted
    own, own_params = small()
    state = env.reset(jax.random.key(0), params)[1]
    wanted = run(own.step, state, own_params)
    observation, after, reward, *ends, info = run(env.step, state, params)
    for one, other in ((observation, wanted[0]), (after, wanted[1]), (reward, wanted[2])):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    at_end = (np.arange(1, STEPS + 1) % EPISODE) == 0
    if version("gymnax").startswith("0."):
        np.testing.assert_array_equal(ends, [at_end])
    else:
        np.testing.assert_array_equal(ends, [np.zeros(STEPS, bool), at_end])
    assert not info["terminated"].any() and (info["discount"] == 1).all()
    np.testing.assert_array_equal(info["truncated"], at_end)
    np.testing.assert_array_equal(info["final_observation"], wanted[-1]["final_observation"])
    assert (observation != info["final_observation"]).any(axis=1).tolist() == at_end.tolist()


def test_random_calls_are_answered_as_by_the_environment_in_each_row(adapted):
    env, params = adapted
    own, own_params = small()
    compiled = {"compiler_options": CHEAP_COMPILE}
    steps = jax.jit(jax.vmap(env.step, (0, 0, 0, None)), **compiled), jax.jit(own.step, **compiled)
    resets = jax.jit(jax.vmap(env.reset, (0, None)), **compiled), jax.jit(own.reset, **compiled)
    observes = jax.jit(jax.vmap(env.get_obs, (0, None)), **compiled), jax.jit(own.observe, **compiled)

    def rows(call):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get([call(index) for index in range(2)]))

    class OfGymnax(Calls):
        def __init__(self):
            super().__init__()
            self.ours, self.theirs = {}, {}

        @rule(seed=st.integers(0, 2**32 - 1), raw=st.booleans())
        def reset(self, seed, raw):
            keys = jax.random.split(jax.random.PRNGKey(seed) if raw else jax.random.key(seed))
            ours = resets[0](keys, params)
            self.keep(ours, rows(lambda index: resets[1](keys[index], own_params)))

        def keep(self, ours, theirs):
            self.ours, self.theirs = {"state": ours[1]}, {"state": theirs[1]}
            answers = iter((jax.device_get(theirs), jax.device_get(ours)))
            self.both(lambda _: dict(enumerate(map(vars_of, next(answers)))))

        @precondition(lambda self: self.ours)
        @rule(seed=st.integers(0, 2**32 - 1), actions=ACTIONS)
        def step(self, seed, actions):
            keys, actions = jax.random.split(jax.random.key(seed)), actions.astype(np.int32)  # each dtype is a program
            *ours, _ = steps[0](keys, self.ours["state"], actions, params)

            def one(index):
                state = jax.tree.map(lambda leaf: leaf[index], self.theirs["state"])
                values = steps[1](keys[index], state, actions[index], own_params)[:5]
                return values if len(ours) == 5 else (*values[:3], values[3] | values[4])

            self.keep(ours, rows(one))

        @precondition(lambda self: self.ours)
        @rule()
        def get_obs(self):
            theirs = rows(lambda i: observes[1](jax.tree.map(lambda leaf: leaf[i], self.theirs["state"]), own_params))
            answers = iter((theirs, observes[0](self.ours["state"], params)))
            self.both(lambda _: vars_of(next(answers)))

    call_at_random(OfGymnax)


def vars_of(tree):
    """A pytree as a dict of its leaves, copied."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in paths}


@pytest.mark.parametrize(("five", "count"), [(True, 5), (False, 6)])
def test_both_views_whatever_is_installed(five, count):
    env, params = adapters.to_gymnax(*small(), five_values=five)
    key = jax.random.key(0)
    assert len(jax.eval_shape(env.step, key, env.reset(key)[1], 0)) == count


def test_gymnaxs_log_wrapper_sees_episodes(adapted):
    env, params = adapted
    logged = LogWrapper(env)
    # gymnax 0.0.9 begins with Python's numbers.
    state = jax.tree.map(jnp.asarray, logged.reset(jax.random.key(0), params)[1])
    state = state.replace(**{n: jnp.float32(0) for n in ("episode_returns", "returned_episode_returns")})
    info = run(logged.step, state, params)[-1]
    assert info["returned_episode_lengths"][EPISODE - 1 :].tolist() == [EPISODE] * (STEPS - EPISODE + 1)
    assert info["returned_episode"].sum() == 2


def test_copies(adapted):
    env, params = adapted
    key = jax.random.key(0)
    wanted = env.reset(key, params)[0]
    for copied in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        np.testing.assert_array_equal(copied.reset(key)[0], wanted)
    with pytest.raises(NotImplementedError, match="call step"):
        env.step_env(key, None, 0, params)
