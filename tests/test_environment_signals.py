"""What a router sees with `signal_delay`: the engines as they were at the last scrape, and nothing newer; and with
`signals="counts"`: gauges, and no request."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.environment.few_slots import FEW_SLOTS
from jaxroute.environment.signals import counted
from jaxroute.simulator.cluster import AFTER_ALL, run_until
from jaxroute.simulator.disciplines import used_blocks
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


# Counts


@pytest.fixture(scope="module")
def counts(case):
    """The same requests and actions, with engines that export counts."""
    env = dataclasses.replace(case.env, signals="counts")
    params = case.params.replace(signal_delay=None)
    with jax.enable_x64(True):
        actions = jnp.asarray(np.random.default_rng(0).choice(3, STEPS, p=[0.7, 0.2, 0.1]), jnp.int32)
        run = jax.jit(lambda params: rollout(env, params, jax.random.key(1), actions), compiler_options=CHEAP_COMPILE)
        return env, params, jax.device_get(run(params))


def test_gauges_are_the_engines_own(case, counts):
    env, params, run = counts
    jax.tree.map(close, (run.reward, run.before.engines), (case.fresh.reward, case.fresh.before.engines))
    seen, own = run.before.scrape.engines, run.before.engines
    np.testing.assert_array_equal(seen.num_requests, own.num_requests)
    np.testing.assert_array_equal(seen.num_running, own.num_running)
    used = [jax.vmap(used_blocks, (0, None))(state, params.engines) for state in (seen, own)]
    assert (used[0] <= used[1] + own.num_running).all() and (used[0] >= used[1] - own.num_running).all()
    assert used[0].max() > 20


def test_requests_behind_equal_gauges_make_no_difference(counts):
    """Other ages, lengths, predictions and scores of the requests there, and another start of the next iteration."""
    with jax.enable_x64(True):
        env, params, run = counts
        before = run.before
        last = int(before.engines.num_running.max(1).argmax())
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf[last]), before)
        engines, queued, request = state.engines, state.queued, state.request
        wanted = counted(engines, queued, request, params.engines)
        other = engines.replace(
            clock=engines.clock - 0.003,
            prompt_tokens=engines.prompt_tokens + engines.generated // 2,
            generated=engines.generated - engines.generated // 2,
            target_tokens=engines.target_tokens * 3,
            preemptions=engines.preemptions + 1,
            first_token_time=engines.first_token_time - 1,
        )
        hidden = jax.tree.map(lambda leaf: leaf * 2 + 1, queued)
        jax.tree.map(np.testing.assert_array_equal, counted(other, hidden, request, params.engines), wanted)
        # Neither rules nor observations read what is behind the scrape.
        behind = state.replace(engines=other.replace(num_requests=other.num_requests * 0), queued=hidden)
        jax.tree.map(np.testing.assert_array_equal, env.observe(behind, params), env.observe(state, params))
        for name in ("least_work", "lookahead", "universal"):
            router = jax.jit(jaxroute.make_router(name, env), compiler_options=CHEAP_COMPILE)
            assert router(jax.random.key(0), None, behind, params) == router(jax.random.key(0), None, state, params)


def test_what_is_seen_can_run(counts):
    """So that routers that simulate have a future: every request that is seen ends, after half of its output."""
    env, params, run = counts
    with jax.enable_x64(True):
        seen = jax.tree.map(jnp.asarray, run.before.scrape)
        ends = jax.vmap(lambda engines: run_until(engines, AFTER_ALL, params.engines)[0].finish_time)
        finish = jax.jit(ends, compiler_options=CHEAP_COMPILE)(seen.engines)
    there = np.arange(SLOTS)[:, None] < np.asarray(seen.engines.num_requests)[:, None]
    assert np.isfinite(finish[there]).all() and there.sum() > 500
    state, running = seen.engines, np.arange(SLOTS)[:, None] < np.asarray(seen.engines.num_running)[:, None]
    held = np.asarray(state.prompt_tokens + state.generated - 1)
    np.testing.assert_array_equal(np.asarray(state.computed)[running], held[running])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "vllm-0.33"}, "signals=counts needs engines without prefix caching"),
        ({"discipline": "orca"}, "signals=counts needs engines whose used blocks grow"),
    ],
)
def test_counts_need_engines_that_have_nothing_else(changes, words):
    env, params = jaxroute.make("paper-3", signals="counts", **changes)
    with pytest.raises(jaxroute.UserError, match=words):
        env.reset(jax.random.key(0), params)
    overrides = ["environment.signals=counts", *(f"environment.{key}={value}" for key, value in changes.items())]
    with pytest.raises(jaxroute.UserError, match=f"environment.signals: {words}"):
        build_experiment(load_config(None, overrides))
