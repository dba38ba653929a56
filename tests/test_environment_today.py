"""The environment with vLLM's present defaults, prefix caching and asynchronous scheduling, in float64, against the
plain Python cluster; and the presets of versions.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import SCENARIOS, make, make_params
from jaxroute.errors import UserError
from jaxroute.simulator.presets import PRESETS, seats_and_budget
from tests.rollouts import CLOSE, judged, same_counts, same_qos_and_timings, with_engines

EPISODE, SLOTS = 150, 16


@pytest.fixture(scope="module", params=["both", "asynchronous scheduling"])
def case(request):
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(1 / 9, EPISODE + 1))
    actions = rng.choice(4, EPISODE, p=[0.25, 0.35, 0.35, 0.05])
    with jax.enable_x64(True):
        env = RoutingEnvironment(3, slots=SLOTS, episode_length=EPISODE, metrics="exact", penalty="off")
        params = make_params(SCENARIOS["paper-3"], latency_limit=0.08, engine="vllm-0.33")
        params = with_engines(params, usable_blocks=[24, 30, 60], max_num_seqs=[64, 64, 5])
        if request.param != "both":
            params = params.replace(engines=params.engines.replace(enable_prefix_caching=False))
    return judged(env, params, times, actions)


def test_qos_of_every_step_and_timings_of_every_request(case):
    assert sum(expert.preemptions for expert in case.cluster.experts) > 20
    same_qos_and_timings(case)


def test_totals(case):
    totals, cluster = case.totals, case.cluster
    same_counts(case)
    np.testing.assert_allclose(totals.busy, [expert.busy for expert in cluster.experts], **CLOSE)
    np.testing.assert_allclose(totals.elapsed, cluster.elapsed(), **CLOSE)
    block_seconds = [expert.block_seconds for expert in cluster.experts]
    np.testing.assert_allclose(totals.block_seconds, block_seconds, rtol=0.02)


def test_a_preset_has_the_switches_of_its_version_and_seats_by_gpu():
    engines = build_experiment(load_config(overrides=["environment.engine=vllm-0.33"])).params.engines
    assert engines.enable_prefix_caching and engines.async_scheduling and not engines.threshold_when_alone
    assert engines.max_num_seqs.tolist() == [64] * 3, "the profile's"
    engines = make_params(SCENARIOS["paper-3"], profile="h100", engine="vllm-0.19").engines
    assert engines.enable_prefix_caching and engines.threshold_when_alone and not engines.unhashed_first
    assert engines.max_num_seqs.tolist() == [1024] * 3 and engines.max_num_batched_tokens.tolist() == [8192] * 3
    assert make_params(SCENARIOS["paper-3"], engine="vllm-0.6").engines.discipline == "vllm_v0"
    today = PRESETS["vllm-0.33"]
    sizes = {gpu: tuple(seats_and_budget(today, gpu).values()) for gpu in (None, "rtx4090", "a100", "h200", "b200")}
    small, large = (256, 2048), (1024, 8192)
    assert sizes == {None: small, "rtx4090": small, "a100": small, "h200": large, "b200": (1024, 16_384)}


def test_an_unknown_or_contradictory_preset_is_one_line():
    with pytest.raises(UserError, match="unknown engine 'vllm-0.34'; the nearest are vllm-0.33"):
        make_params(SCENARIOS["paper-3"], engine="vllm-0.34")
    with pytest.raises(UserError, match="engine vllm-0.33 has its own discipline, vllm_v1; leave discipline out"):
        make_params(SCENARIOS["paper-3"], engine="vllm-0.33", discipline="orca")
    with pytest.raises(UserError, match="unknown GPU 'h1'"):
        seats_and_budget(PRESETS["vllm-0.33"], "h1")


def test_experts_of_different_switches_are_one_line(tmp_path):
    paths = []
    for switch in (True, False):
        engine = f"{{latency: [0.01, 0, 0, 0], num_gpu_blocks: 99, async_scheduling: {str(switch).lower()}}}"
        paths.append(tmp_path / f"{switch}.yaml")
        paths[-1].write_text(f"engine: {engine}\n")
    experts = "".join(f"  - {{mean_score: 0.7, profile: {path}}}\n" for path in paths)
    file = tmp_path / "experts.yaml"
    file.write_text(f"experts:\n{experts}")
    with pytest.raises(UserError, match=r"experts.yaml: experts: async_scheduling must be the same for all experts"):
        make("cluster", path=file)
    with pytest.raises(UserError, match="experts: async_scheduling must be the same for all experts"):
        make_params(SCENARIOS["paper-3"][:2], profile=[str(path) for path in paths])
