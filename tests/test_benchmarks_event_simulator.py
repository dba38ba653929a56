"""The compiled event-driven simulator of the benchmarks: its schedules, and its cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("numba", reason="numba, of the extra `bench`, is not installed")

from benchmarks.event_simulator import Arrivals, Replay, shortest_queue
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import SCENARIOS, make_params
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload
from tests.reference.cases import random_case
from tests.reference.engine import simulate
from tests.rollouts import CHEAP_COMPILE

FILES = sorted((Path(__file__).parent / "data" / "vllm_schedules").glob("*.json"))
REQUEST_FIELDS = ("first_token_time", "finish_time", "preemptions", "emitted")
SUMMARY_FIELDS = ("iterations", "preemptions", "end_time")


def wanted(schedule: dict[str, Any], records: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What `Replay.result` must give for a recorded or reference schedule."""
    return {
        "status": schedule["status"],
        "per_request": {
            identifier: {field: request[field] for field in REQUEST_FIELDS}
            for identifier, request in schedule["per_request"].items()
        },
        "summary": {field: schedule["summary"][field] for field in SUMMARY_FIELDS},
        "totals": {total: sum(record[total] for record in records or ()) for total in ("np", "nd", "ctx")},
    }


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_equals_vllm(path):
    schedule = json.loads(path.read_text())
    got, expected = Replay.of(schedule).result(), wanted(schedule, schedule["iterations"])
    if schedule["iterations"] is None:
        got.pop("totals")
        expected.pop("totals")
    assert got == expected


def test_equals_the_reference_on_random_cases():
    rng = np.random.default_rng(20)
    for index in range(200):
        spec = random_case(rng)
        reference = simulate(spec)
        assert Replay.of(spec).result() == wanted(reference, reference["iterations"]), f"case {index}"


STEPS = 1500


@pytest.fixture(scope="module")
def rollout():
    """A program: parameters and key -> requests and gaps after them [STEPS, ...], and the episode's totals."""
    env = RoutingEnvironment(num_experts=3, slots=8, episode_length=STEPS, penalty="off")

    def run(params, key):
        _, state = env.reset(key, params)

        def step(state, key):
            action = jnp.argmin(env.queue_lengths(state))
            gap = params.workload.sample(jax.random.split(key)[0], state.workload)[1]  # as the step draws it
            _, after, _, _, _, info = env.step(key, state, action, params)
            return after, (state.request, gap, info["episode"])

        _, (requests, gaps, totals) = jax.lax.scan(step, state, jax.random.split(key, STEPS))
        return requests, gaps, jax.tree.map(lambda leaf: leaf[-1], totals)

    with jax.enable_x64(True):
        yield jax.jit(run, compiler_options=CHEAP_COMPILE)


# 1,500 tokens and a budget of 64 mean chunks, blocked heads and preemptions; 320 tokens also requests that never fit.
@pytest.mark.parametrize(
    ("rate", "kv_cache_tokens", "budget"), [(3.0, None, 2048), (12.0, 1500, 64), (6.0, [320, 640, 1500], 2048)]
)
def test_cluster_equals_the_environment(rollout, rate, kv_cache_tokens, budget):
    experts = SCENARIOS["paper-3"]
    workload = Workload.create(
        PoissonArrivals.create(rate), FrozenRequests.create([EXPERTS[name].mean_score for name in experts])
    )
    params = make_params(experts, workload=workload, kv_cache_tokens=kv_cache_tokens)
    engines = params.engines.replace(max_num_batched_tokens=jnp.full(3, budget, jnp.int32))
    params = params.replace(engines=engines)
    requests, gaps, totals = jax.device_get(rollout(params, jax.random.key(3)))
    arrivals = Arrivals(
        gap=np.append(0.0, gaps[:-1]),
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        score=requests.score,
    )
    got = shortest_queue(params.engines, 8, float(params.latency_limit), arrivals)
    assert got.completed == totals.completed.sum()
    assert got.rejected_full == totals.rejected_full.sum()
    assert got.rejected_infeasible == totals.rejected_infeasible.sum()
    assert got.qos == pytest.approx(totals.qos.sum(), rel=1e-12)  # summed in another order
    if rate == 12.0:
        assert got.rejected_full > 0 and totals.preemptions.sum() > 0
    if rate == 6.0:
        assert got.rejected_infeasible > 0
