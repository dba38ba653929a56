"""A recorded list routed to one expert, in float32: the environment's finish times are those of `jaxroute.replay`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.simulator.replay import replay
from jaxroute.workload.arrivals import TraceArrivals
from jaxroute.workload.requests import TraceRequests
from jaxroute.workload.workload import Workload
from tests.rollouts import CHEAP_COMPILE, configs_of, oracle, rollout, with_engines

REQUESTS, EXPERT = 150, 1


@pytest.mark.slow
def test_routing_a_trace_to_one_expert_is_its_replay():
    rng = np.random.default_rng(2)
    times = np.concatenate([[0.0], np.cumsum(rng.exponential(1.1, REQUESTS))])
    prompts, outputs = rng.integers(1, 300, REQUESTS + 1), rng.integers(1, 200, REQUESTS + 1)
    env, params = jaxroute.make("paper-3", slots=24, episode_length=REQUESTS, metrics="exact")
    requests = TraceRequests.create(prompts, outputs, [0.7, 0.6, 0.5])
    params = params.replace(workload=Workload.create(TraceArrivals.create(times), requests))
    params = with_engines(params, usable_blocks=[9, 46, 9], max_num_batched_tokens=[2048, 100, 2048])
    actions = np.full(REQUESTS, EXPERT)
    program = jax.jit(lambda *inputs: rollout(env, *inputs), compiler_options=CHEAP_COMPILE)
    run = jax.device_get(program(params, jax.random.key(0), jnp.asarray(actions)))
    np.testing.assert_array_equal(run.before.request.prompt_tokens, prompts[:REQUESTS])
    np.testing.assert_array_equal(run.before.request.output_tokens[:, EXPERT], outputs[:REQUESTS])

    spec = {
        "config": configs_of(params.engines)[EXPERT],
        "requests": [
            {"arrival_time": float(time), "prompt_len": int(prompt), "output_len": int(output)}
            for time, prompt, output in zip(times[:REQUESTS], prompts, outputs, strict=False)
        ],
    }
    recorded = replay(spec)
    assert recorded["status"] == "ok"
    totals = jax.tree.map(lambda leaf: leaf[-1], run.info["episode"])
    assert totals.completed[EXPERT] == REQUESTS
    assert totals.preemptions[EXPERT] == recorded["summary"]["preemptions"] > 5

    # Float32 can only order what is not closer than its rounding: the schedule's times keep a distance from arrivals.
    cluster, qos = oracle(env, params, run, range(REQUESTS), actions, np.diff(times))
    assert cluster.experts[EXPERT].margin > 1e-5
    np.testing.assert_allclose(run.info["qos"], qos, rtol=1e-4)

    outcome = [recorded["per_request"][str(i)] for i in range(REQUESTS)]
    tokens = np.asarray([request["emitted"] for request in outcome])
    np.testing.assert_array_equal(tokens, outputs[:REQUESTS])
    latency, ttft, tpot = totals.timing_record
    for got, event in ((latency * tokens, "finish_time"), (ttft, "first_token_time")):
        wanted = np.asarray([request[event] for request in outcome]) - times[:REQUESTS]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=event)
    first_to_last = latency * tokens - ttft
    np.testing.assert_allclose((tpot * (tokens - 1))[tokens > 1], first_to_last[tokens > 1], rtol=1e-4, atol=1e-5)
