"""The routers that simulate further arrivals, against whole episodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.errors import UserError
from jaxroute.evaluation import tuning
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.tuning import Tuning, tuned_routers
from jaxroute.routers import rollout
from jaxroute.routers.rollout import action_returns

LENGTH = 30
EPISODES = 3


@pytest.fixture(scope="module")
def busy():
    """An episode in which experts slow down, and requests are dropped and late."""
    return jaxroute.make("overload-3", slots=16, episode_length=LENGTH, queue_nodes=2, penalty="off")


@pytest.fixture(scope="module")
def results(busy):
    """Of a rule and of the rollouts that follow it, to the end of the episodes and for no further arrival."""
    env, params = busy
    rule = jaxroute.make_router("index_rule", env, load_weight=0.02)
    routers = {"rule": rule}
    for name, horizon in (("rollout_clairvoyant", LENGTH), ("rollout", 4)):
        routers[name] = jaxroute.make_router(name, env, policy=rule, horizon=horizon)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "FUTURES", 3)
        return evaluate_routers(env, params, routers, EPISODES, seed=5)


def test_a_return_is_what_an_episode_gives(busy):
    """The return of an action at each decision of an episode equals the QoS of all its requests that end later, if the
    action is taken and the rule decides afterwards."""
    env, params = busy
    rule = jaxroute.make_router("index_rule", env, load_weight=0.02)
    key = jax.random.key(3)
    arrival_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(LENGTH))

    @jax.jit
    def episode(at, other):
        """QoS sums before decision `at` and at the end, and the returns at `at`, where action `other` is taken."""

        def step(carry, inputs):
            observation, before = carry
            arrival_key, index = inputs
            action = jnp.where(index == at, other, rule(arrival_key, observation, before, params))
            observation, state, *_, info = env.step(arrival_key, before, action, params)
            return (observation, state), (before, info["episode"].qos.sum())

        (_, _), (states, qos) = jax.lax.scan(step, env.reset(key, params), (arrival_keys, jnp.arange(LENGTH)))
        state = jax.tree.map(lambda leaf: leaf[at], states)
        so_far = jnp.where(at > 0, qos[at - 1], 0.0)
        return qos[-1] - so_far, action_returns(env, rule, key, state, params, LENGTH)[other]

    at, other = np.meshgrid([0, 11, LENGTH - 1], np.arange(env.num_actions))
    truth, found = jax.vmap(episode)(at.ravel(), other.ravel())
    np.testing.assert_allclose(found, truth, atol=1e-4)
    assert len(np.unique(np.round(truth, 3))) > 6


def test_who_knows_the_future_never_loses_to_the_rule_that_it_follows(results):
    """Policy improvement with exact returns: in no episode less, and in some more."""
    gain = results["rollout_clairvoyant"]["qos"] - results["rule"]["qos"]
    assert (gain >= -1e-6).all() and gain.max() > 0.02


def test_who_samples_the_future_knows_less(results):
    assert results["rollout_clairvoyant"]["qos"].mean() > results["rollout"]["qos"].mean() > 0.1


def test_sampled_futures_depend_on_nothing_that_is_hidden(busy):
    """Equal predictions, speeds and clocks, but other true lengths and scores: the action is the same."""
    env, params = busy
    router = jaxroute.make_router("rollout", env, horizon=3)
    actions = jnp.asarray([0, 0, 1, 2, 1, 2, 0])

    @jax.jit
    def state_and_choice(hidden):
        def step(state, inputs):
            index, action = inputs
            request = state.request
            request = request.replace(
                output_tokens=0 * request.output_tokens + 400 + 40 * hidden, score=request.score * (1 - 0.5 * hidden)
            )
            return env.step(jax.random.key(index), state.replace(request=request), action, params)[1], None

        _, state = env.reset(jax.random.key(1), params)
        state, _ = jax.lax.scan(step, state, (jnp.arange(len(actions)), actions))
        return state, jax.vmap(lambda key: router(key, None, state, params))(jax.random.split(jax.random.key(2), 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "FUTURES", 3)
        (one, chosen), (other, chosen_too) = state_and_choice(0), state_and_choice(1)
    assert (one.queued.score != other.queued.score).any()
    assert (one.engines.target_tokens != other.engines.target_tokens).any()
    np.testing.assert_array_equal(one.engines.generated, other.engines.generated)  # nobody has finished yet
    np.testing.assert_array_equal(chosen, chosen_too)


def test_the_router_that_it_follows(busy):
    env, params = busy
    drop_all = jax.tree_util.Partial(lambda key, observation, state, params: jnp.int32(env.num_experts))
    assert jaxroute.make_router("rollout", env, policy=drop_all).parameters["policy"] is drop_all
    assert jaxroute.make_router("rollout", env).parameters["policy"] == jaxroute.make_router(
        "index_rule+admission", env
    )
    with pytest.raises(UserError, match="router rollout: policy must be a router"):
        jaxroute.make_router("rollout", env, policy=3)
    with pytest.raises(UserError, match="router rollout: horizon must be a finite number"):
        jaxroute.make_router("rollout", env, horizon="far")
    routers = tuned_routers(env, params, ["trained", "rollout"], trained=drop_all)
    assert routers["rollout"].parameters["policy"] is routers["trained"] is drop_all


def test_a_tuned_rule_is_followed_where_nothing_is_trained(busy):
    env, params = busy
    tuned = Tuning({"load_weight": 0.1, "admission": 0.8}, 0.5, 500, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune_routers", lambda env, params, names, **_: dict.fromkeys(names, tuned))
        routers = tuned_routers(env, params, ["rollout_clairvoyant"])
    assert list(routers) == ["rollout_clairvoyant"] and routers["rollout_clairvoyant"].knows_future
    assert routers["rollout_clairvoyant"].parameters["policy"].parameters == tuned.parameters
