"""The environment under the two older disciplines, in float64, against the plain Python cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import SCENARIOS, make_params
from jaxroute.errors import UserError
from jaxroute.simulator.disciplines import DISCIPLINES
from tests.reference import impact
from tests.rollouts import (
    CLOSE,
    judged,
    same_counts,
    same_qos_and_timings,
    wanted_penalties,
    with_engines,
)

EPISODE, SLOTS = 150, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "vllm_v0": {
        "usable_blocks": [9, 14, 40],
        "watermark_blocks": [0, 2, 1],
        "async_output_proc": [True, False, True],
        "max_model_len": [256, 100, 8192],
        "max_num_batched_tokens": [256, 120, 8192],
        "max_num_seqs": [64, 64, 5],
    },
    "orca": {"usable_blocks": [40, 50, 90], "max_model_len": [100, 160, 400], "max_num_seqs": [64, 2, 64]},
}


@pytest.fixture(scope="module", params=OPTIONS)
def case(request):
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(1 / 9, EPISODE + 1))
    actions = rng.choice(4, EPISODE, p=[0.25, 0.35, 0.35, 0.05])
    with jax.enable_x64(True):
        env = RoutingEnvironment(3, slots=SLOTS, episode_length=EPISODE, metrics="exact")
        options = OPTIONS[request.param]
        params = with_engines(
            make_params(SCENARIOS["paper-3"], latency_limit=0.08, discipline=request.param), **options
        )
    found = judged(env, params, times, actions)
    return SimpleNamespace(name=request.param, params=params, **found._asdict())


def test_the_configuration_names_the_discipline_of_every_engine():
    engines = {
        name: build_experiment(load_config(overrides=[f"environment.discipline={name}"])).params.engines
        for name in DISCIPLINES
    }
    assert {name: of.discipline for name, of in engines.items()} == {name: name for name in DISCIPLINES}
    for of in engines.values():
        assert of.usable_blocks.tolist() == [875] * 3
    v0 = engines["vllm_v0"]
    assert v0.watermark_blocks.tolist() == [8] * 3 and v0.async_output_proc.all()
    assert v0.max_num_batched_tokens.tolist() == [8192] * 3
    assert engines["orca"].watermark_blocks is engines["vllm_v1"].async_output_proc is None
    with pytest.raises(UserError, match="unknown discipline 'vllm'; the nearest are vllm_v1, vllm_v0"):
        make_params(SCENARIOS["paper-3"], discipline="vllm")


def test_the_case_contains_what_it_is_for(case):
    served = [fate.served for fate in case.cluster.fates if fate.served]
    assert case.cluster.count("completed") > 60 and case.cluster.count("rejected_infeasible") > 3
    assert any(fate.violated for fate in case.cluster.fates) and any(fate.qos > 0 for fate in case.cluster.fates)
    preemptions = sum(request.preemptions for request in served)
    if case.name == "orca":
        assert preemptions == 0
    else:
        assert preemptions > 20
        assert sum(request.finish_time is None and request.generated > 0 for request in served) > 3, "grew too large"


def test_qos_of_every_step_and_timings_of_every_request(case):
    same_qos_and_timings(case)


def test_totals_count_ignored_requests_as_infeasible(case):
    totals, cluster = case.totals, case.cluster
    same_counts(case)
    preemptions = np.zeros(3)
    for fate in cluster.fates:
        if fate.status == "completed":
            preemptions[fate.expert] += fate.served.preemptions
    np.testing.assert_array_equal(totals.preemptions, preemptions)
    np.testing.assert_allclose(totals.busy, [expert.busy for expert in cluster.experts], **CLOSE)
    np.testing.assert_allclose(totals.elapsed, cluster.elapsed(), **CLOSE)
    block_seconds = [expert.block_seconds for expert in cluster.experts]
    # Blocks in use are taken as growing linearly within a run of decodes; reserved ones do not grow.
    np.testing.assert_allclose(totals.block_seconds, block_seconds, rtol=1e-9 if case.name == "orca" else 0.02)


def test_penalty_of_every_step(case):
    limit = float(case.params.latency_limit)
    wanted = wanted_penalties(case.params, case.run, case.cluster, limit, lambda queue, _: impact.predicted(queue))
    assert (wanted > 0).sum() > 2
    np.testing.assert_allclose(case.run.info["penalty"], wanted, **CLOSE)


def test_masked_actions_are_those_that_would_be_rejected(case):
    """A prompt decides it under these disciplines, so what the mask allows is never rejected."""
    masks, actions = case.run.observation.action_mask[: EPISODE - 1], [fate.expert for fate in case.cluster.fates]
    barred = 0
    for mask, action, fate in zip(masks, actions[1:], case.cluster.fates[1:], strict=True):
        if action is not None:
            assert mask[action] == (fate.served is not None)
            barred += not mask[action]
    assert barred > 3
