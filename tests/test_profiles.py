"""Hardware profiles, clusters of mixed hardware, and what a router's action outside of its range does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.registry import make_params
from jaxroute.errors import UserError
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.latency import iteration_time
from jaxroute.simulator.profiles import EXPERTS
from tests.rollouts import CHEAP_COMPILE


def test_the_frozen_scenario_is_what_it_says():
    _, params = jaxroute.make("paper-6")
    engines = params.engines
    latency = engines.latency
    for got, wanted in (
        (latency.base, 0.015),
        (latency.per_prefill_token, 7.2e-5),
        (latency.per_decode, 5e-5),
        (latency.per_context_token, 2.5e-5),
        (params.latency_limit, 0.030),
        (engines.usable_blocks, 14_000 // 16),
        (engines.max_num_seqs, 64),
        (params.workload.arrivals.rate, 3.0),
        (params.workload.requests.score_mean, [0.7146, 0.7038, 0.6321, 0.6396, 0.6557, 0.6321]),
    ):
        np.testing.assert_allclose(got, np.broadcast_to(wanted, np.shape(got)), rtol=1e-6)


@pytest.mark.parametrize(("gpu", "milliseconds"), [("a100", (9.3, 17.8, 133.5)), ("rtx3090", (21.7, 67.5, 519.0))])
def test_a_gpu_takes_the_measured_time_of_its_linear_layers(gpu, milliseconds):
    engines = make_params(["alpaca-native"], profile=gpu).engines
    latency = jax.tree.map(lambda leaf: leaf[0], engines.latency)
    for tokens, wanted in zip((256, 2048), milliseconds[1:], strict=True):
        # The base is the time at one token.
        time = iteration_time(latency, jnp.int32(tokens - 1), jnp.int32(0), jnp.int32(0))
        np.testing.assert_allclose(1e3 * time, wanted, rtol=0.01)


def test_experts_may_have_hardware_and_caches_of_their_own():
    experts = ["chatglm-6b", "vicuna-13b", "alpaca-native"]
    engines = make_params(experts, profile=["rtx3090", "a100", "h100"]).engines
    blocks = np.asarray(engines.usable_blocks)
    for expert, gpu, found in zip(experts, ("rtx3090", "a100", "h100"), blocks, strict=True):
        room = 0.9e9 * GPUS[gpu].memory_gb - 1e9 * EXPERTS[expert].weights_gb
        assert room / EXPERTS[expert].kv_bytes / 16 - 3 < found < room / EXPERTS[expert].kv_bytes / 16
    engines = make_params(experts, kv_cache_tokens=[160, 320, 16]).engines
    assert engines.usable_blocks.tolist() == [10, 20, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"profile": "rtx3090"}, "does not fit"),
        ({"profile": ["a100", "a100"]}, "2 names for 1 experts"),
        ({"profile": "a10"}, "a100"),
        ({"kv_cache_tokens": 15}, "at least 16"),
        ({"kv_cache_tokens": [16, 16]}, "2 numbers for 1 experts"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, says):
    with pytest.raises(UserError, match=says):
        make_params(["vicuna-13b"], **arguments)


def test_an_action_outside_of_its_range_drops_the_request():
    env, params = jaxroute.make("paper-3", slots=4)
    _, state = jax.jit(env.reset)(jax.random.key(0), params)
    step = jax.jit(env.step, compiler_options=CHEAP_COMPILE)
    for action in (-1, 3, 4):
        _, state, *_ = step(jax.random.key(1), state, jnp.int32(action), params)
    assert (state.totals.arrived, state.totals.dropped) == (3, 3)
    assert env.queue_lengths(state).tolist() == [0, 0, 0]
