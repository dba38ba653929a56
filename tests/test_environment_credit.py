"""The reward credits a request's QoS to its arrival: discounted from there on, it is worth what it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from tests.rollouts import CHEAP_COMPILE, rollout

DISCOUNT, STEPS = 0.8, 60


def test_discounted_rewards_are_the_qos_of_each_request_at_its_arrival():
    env, params = jaxroute.make("paper-3", slots=8, penalty="off", metrics="off")
    # One request every 20 decisions; the others are dropped, so that what finishes is known to be the last one routed.
    actions = jnp.where(jnp.arange(STEPS) % 20 == 0, 0, env.num_experts)
    program = jax.jit(lambda params: rollout(env, params, jax.random.key(3), actions), compiler_options=CHEAP_COMPILE)
    plain, credited = (program(params.replace(credit_discount=jnp.asarray(each, float))) for each in (1, DISCOUNT))
    np.testing.assert_array_equal(plain.reward, plain.info["qos"])
    np.testing.assert_array_equal(credited.info["qos"], plain.info["qos"])

    time = np.concatenate([[0.0], np.cumsum(plain.info["elapsed"])[:-1]])  # of each decision
    scores = np.asarray(plain.before.request.score[::20, 0])
    finished = np.flatnonzero(plain.reward)
    assert len(finished) == 3 and (finished % 20 > 0).any()  # some of them later than in their own step
    np.testing.assert_allclose(plain.reward[finished], scores, rtol=1e-6)
    np.testing.assert_allclose(
        DISCOUNT ** time[finished] * credited.reward[finished], DISCOUNT ** time[::20] * scores, rtol=1e-4
    )
