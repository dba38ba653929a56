"""What a router sees with `signal_delay`: the engines as they were at the last scrape, and nothing newer."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.few_slots import FEW_SLOTS
from tests.rollouts import CHEAP_COMPILE, rollout

STEPS, EPISODE, SLOTS = 100, 60, 24
DELAY = 1.0


@pytest.fixture(scope="module")
def case():
    """Runs of equal requests and actions: without a delay, with one of 0 s, and with one of `DELAY`."""
    with jax.enable_x64(True):
        env, params = jaxroute.make("overload-3", slots=SLOTS, episode_length=EPISODE, metrics="off", penalty="off")
        actions = jnp.asarray(np.random.default_rng(0).choice(3, STEPS, p=[0.7, 0.2, 0.1]), jnp.int32)
        run = jax.jit(lambda params: rollout(env, params, jax.random.key(1), actions), compiler_options=CHEAP_COMPILE)
        delays = [params] + [params.replace(signal_delay=jnp.asarray(delay)) for delay in (0.0, DELAY)]
        fresh, at_once, late = (jax.device_get(run(own)) for own in delays)
    assert fresh.before.engines.num_requests.max() > FEW_SLOTS
    return SimpleNamespace(env=env, params=delays[-1], fresh=fresh, at_once=at_once, late=late)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9)


def last_scrapes(gaps):
    """For each decision, that of the last scrape, in plain Python."""
    scrapes, age = [0], 0.0
    for decision, gap in enumerate(gaps, 1):
        age += gap
        if decision % EPISODE == 0 or age >= DELAY:
            scrapes.append(decision)
            age = 0.0
        else:
            scrapes.append(scrapes[-1])
    return scrapes


def test_no_delay_and_a_delay_of_nothing_are_equal(case):
    for got, wanted in ((case.at_once, case.fresh), (case.late, case.fresh)):
        jax.tree.map(close, (got.reward, got.before.engines), (wanted.reward, wanted.before.engines))
    jax.tree.map(close, case.at_once.observation, case.fresh.observation)


def test_the_engines_are_seen_as_at_the_last_scrape(case):
    scrapes = last_scrapes(case.fresh.info["elapsed"])
    assert 10 < len(set(scrapes)) < STEPS - 20
    observe = jax.jit(case.env.observe, compiler_options=CHEAP_COMPILE)
    before, params = case.fresh.before, case.params.replace(signal_delay=None)
    for decision in range(1, STEPS):
        then = scrapes[decision]
        state = jax.tree.map(lambda leaf, i=decision: leaf[i], before)
        seen = jax.tree.map(lambda leaf, i=then: leaf[i], (before.engines, before.queued))
        with jax.enable_x64(True):
            wanted = observe(state.replace(engines=seen[0], queued=seen[1]), params)
        got = jax.tree.map(lambda leaf, i=decision: leaf[i - 1], case.late.observation)
        jax.tree.map(close, got, jax.device_get(wanted))


def test_routers_see_no_more_unless_they_are_clairvoyant(case):
    late = case.late.before
    hidden = late.engines.replace(num_requests=late.engines.num_requests * 0, num_running=late.engines.num_running * 0)
    for name, sees_all in (("shortest_queue", False), ("least_work+admission", False), ("clairvoyant", True)):
        router = jaxroute.make_router(name, case.env)
        decide = jax.jit(
            jax.vmap(lambda state, router=router: router(jax.random.key(0), None, state, case.params)),
            compiler_options=CHEAP_COMPILE,
        )
        with jax.enable_x64(True):
            same = np.array_equal(decide(late), decide(late.replace(engines=hidden)))
        assert same == (not sees_all), name
    state = jax.tree.map(lambda leaf: leaf[30], late)
    np.testing.assert_array_equal(case.env.queue_lengths(state), state.scrape.engines.num_requests)
