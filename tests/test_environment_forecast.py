"""The forecast equals a plain Python loop over requests, and depends on nothing that a router cannot know."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.forecast import SPREAD_AHEAD, SPREAD_DONE, forecast
from tests.rollouts import CHEAP_COMPILE, rollout

STEPS = 120


@pytest.fixture(scope="module")
def visited():
    """States of a small cluster whose memory and seats run out, and its parameters."""
    env, params = jaxroute.make("paper-3", slots=24, kv_cache_tokens=[1200, 3000, 14000], metrics="off", penalty="off")
    params = params.replace(engines=params.engines.replace(max_num_seqs=jnp.asarray([64, 4, 64], jnp.int32)))
    actions = jnp.asarray(np.random.default_rng(0).integers(0, 3, STEPS), jnp.int32)
    fast = jax.tree.map(lambda leaf: leaf * 3, params.workload.arrivals)
    params = params.replace(workload=params.workload.replace(arrivals=fast))
    run = jax.jit(lambda key: rollout(env, params, key, actions), compiler_options=CHEAP_COMPILE)(jax.random.key(1))
    return jax.device_get(run.before), jax.device_get(params), env


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -500 else 0.0


def reference(state, params, e: int) -> dict[str, float]:
    """The forecast of expert `e`, request by request."""
    engines, queued, options = state.engines, state.queued, params.engines
    model = jax.tree.map(lambda leaf: float(leaf[e]), options.latency)
    limit, size = float(params.latency_limit), int(options.block_size[e])
    count, running = int(engines.num_requests[e]), int(engines.num_running[e])
    prompt, own = int(state.request.prompt_tokens), float(state.request.predicted_output_tokens[e])

    def iteration(batch: int, context: float) -> float:
        above = max(batch - model.knee_tokens, 0) * model.per_token_above_knee
        return model.base + model.per_decode * batch + model.per_context_token * context + above

    def prefill(tokens: int) -> float:
        return model.per_prefill_token * tokens + max(tokens - model.knee_tokens, 0) * model.per_token_above_knee

    held, left = [], []
    for s in range(count):
        held.append(
            int(engines.computed[s, e]) if s < running else int(engines.prompt_tokens[s, e] + engines.generated[s, e])
        )
        left.append(max(int(queued.predicted_tokens[s, e]) - int(engines.generated[s, e]), 1))
    alone, joined = iteration(count, sum(held)), iteration(count + 1, sum(held) + prompt + own / 2)
    usable = int(options.usable_blocks[e])
    turnover = alone * sum(left[:running]) / max(running, 1) ** 2
    begun, waited, blocks, unseated = max(float(engines.clock[e]), 0), 0.0, 0, 0
    impact = at_risk = 0.0
    for s in range(count):
        blocks += -(-held[s] // size)
        if s >= running:
            waited += prefill(held[s])
            unseated += blocks > usable or s + 1 > int(options.max_num_seqs[e])
        length = left[s] + int(engines.generated[s, e])
        delay = waited + turnover * unseated
        finish = begun - float(queued.arrival[s, e]) + delay + alone * left[s]
        later = finish + (joined - alone) * min(left[s], own) + (prefill(prompt) if s < running else 0)
        spread = SPREAD_DONE + SPREAD_AHEAD * left[s] / length
        chance, chance_later = (sigmoid((1 - f / length / limit) / spread) for f in (finish, later))
        score = float(queued.predicted_score[s, e])
        impact, at_risk = impact + score * (chance - chance_later), at_risk + score * (1 - chance)
    own_unseated = blocks + -(-(prompt + 1) // size) > usable or count >= int(options.max_num_seqs[e])
    own_finish = begun + waited + turnover * (unseated + own_unseated) + prefill(prompt) + joined * own
    chance = sigmoid((1 - own_finish / own / limit) / (SPREAD_DONE + SPREAD_AHEAD))
    return {
        "expected_qos": float(state.request.predicted_score[e]) * chance,
        "impact": impact,
        "at_risk": at_risk,
        "iteration_time": joined,
        "remaining_tokens": sum(left),
        "prefill_time": waited,
    }


def test_it_equals_a_loop_over_requests(visited):
    states, params, _ = visited
    ours = jax.jit(jax.vmap(forecast, (0, None)), compiler_options=CHEAP_COMPILE)(states, params)
    waiting = states.engines.num_requests - states.engines.num_running
    assert (waiting > 0).any(axis=0).all()  # every expert has had a queue
    for step in range(0, STEPS, 3):
        state = jax.tree.map(lambda leaf, step=step: leaf[step], states)
        for e in range(3):
            for name, value in reference(state, params, e).items():
                assert float(getattr(ours, name)[step, e]) == pytest.approx(value, rel=2e-3, abs=2e-4), (name, step, e)


def test_it_reads_no_true_length_and_no_true_score(visited):
    states, params, _ = visited
    changed = states.replace(
        engines=states.engines.replace(
            target_tokens=states.engines.target_tokens + 50 * (states.engines.target_tokens > 0)
        ),
        queued=states.queued.replace(score=states.queued.score / 2),
        request=states.request.replace(output_tokens=states.request.output_tokens + 9, score=states.request.score / 2),
    )
    both = [
        jax.jit(jax.vmap(forecast, (0, None)), compiler_options=CHEAP_COMPILE)(s, params) for s in (states, changed)
    ]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)
