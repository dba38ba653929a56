"""A step is traced once whatever the parameters are, and a long run needs no more memory than a short one."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment import environment
from tests.rollouts import CHEAP_COMPILE

pytestmark = pytest.mark.usefixtures("optimised_programs")


def _resident_bytes() -> int:
    """Memory of this process that is in use, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_steps_are_one_trace():
    env, params = jaxroute.make("paper-3", slots=20, episode_length=300)
    chex.clear_trace_counter()

    @functools.partial(jax.jit, compiler_options=CHEAP_COMPILE)
    @chex.assert_max_traces(n=1)
    def step(keys, state, action, params):
        return jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)

    keys = jax.random.split(jax.random.key(0), 2)
    _, state = jax.jit(jax.vmap(env.reset, (0, None)))(keys, params)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        arrivals = params.workload.arrivals.replace(rate=jnp.asarray(rng.uniform(1, 9), jnp.float32))
        engines = params.engines.replace(usable_blocks=jnp.asarray(rng.integers(300, 900, 3), jnp.int32))
        changed = params.replace(workload=params.workload.replace(arrivals=arrivals), engines=engines)
        _, state, *_ = step(keys, state, jnp.asarray(rng.integers(0, 4, 2), jnp.int32), changed)
    assert state.step.tolist() == [1000 % 300] * 2


def test_programs_share_the_trace_of_a_step(monkeypatch):
    """One for the environment alone and one for the batch, also of a second program and under a further vmap."""
    env, params = jaxroute.make("paper-3", slots=7, episode_length=11, metrics="off", penalty="off")
    traced, step = [], environment.step
    monkeypatch.setattr(environment, "step", lambda *inputs: traced.append(inputs[2].shape) or step(*inputs))

    def one_step(keys):
        _, state = jax.vmap(env.reset, (0, None))(keys, params)
        return jax.vmap(env.step, (0, 0, 0, None))(keys, state, jnp.zeros(3, jnp.int32), params)

    keys = jax.random.split(jax.random.key(0), 3)
    for program, inputs in ((one_step, keys), (lambda keys: one_step(keys), keys), (jax.vmap(one_step), keys[None])):
        jax.eval_shape(program, inputs)
        assert traced == [(1,), (3,)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from Linux's /proc")
def test_a_million_decisions_need_no_more_memory():
    env, params = jaxroute.make("paper-6", episode_length=1000)
    num_envs, steps = 256, 200

    def run(state, key, params):
        def step(state, key):
            action = jnp.argmin(env.queue_lengths(state), axis=-1)
            _, state, reward, *_ = jax.vmap(env.step, (0, 0, 0, None))(
                jax.random.split(key, num_envs), state, action, params
            )
            return state, reward.mean()

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    _, state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), num_envs), params)
    program = jax.jit(run, donate_argnums=0)
    resident, arrays = [], []
    for call in range(20):
        state, rewards = program(state, jax.random.key(call), params)
        assert np.isfinite(rewards).all()
        resident.append(_resident_bytes())
        arrays.append(len(jax.live_arrays()))
    assert len(set(arrays[2:])) == 1
    # Where other tests ran before, the process's memory goes up and down by some megabytes. The state alone takes five:
    # if every call left one behind, these would be 75.
    assert resident[-1] - resident[4] < 2e7
