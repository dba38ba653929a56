"""The environment in float64 against the plain Python cluster, on engines and loads of many kinds at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.metrics import TIMINGS, summarize
from jaxroute.simulator.replay import replay
from jaxroute.workload.arrivals import TraceArrivals
from jaxroute.workload.workload import Workload
from tests.reference import impact
from tests.rollouts import batch_of_runs, configs_of, oracle, wanted_penalties, with_engines

EPISODE, STEPS, SLOTS = 200, 240, 24
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def _scenarios(params: Any) -> dict[str, tuple[Any, np.ndarray, np.ndarray]]:
    """Name -> (parameters, arrival times [EPISODE + 1], actions [STEPS])."""
    rng = np.random.default_rng(7)

    def arrivals(rate: float) -> np.ndarray:
        return np.cumsum(rng.exponential(1 / rate, EPISODE + 1))

    def random(drop: float = 0.1) -> np.ndarray:
        return rng.choice(4, STEPS, p=[(1 - drop) / 3] * 3 + [drop])

    paper = (0.015, 7.2e-5, 5e-5, 2.5e-5)
    tick = 2.0**-7
    grid = np.cumsum(tick * rng.integers(0, 40, EPISODE + 1) * rng.integers(0, 2, EPISODE + 1))
    return {
        "paper": (params, arrivals(3), random()),
        # KV caches of a few requests: preemptions, and requests that can never fit.
        "tight memory": (
            with_engines(
                params,
                usable_blocks=[17, 30, 90],
                block_size=[16, 13, 5],
                max_num_batched_tokens=[2048, 2048, 64],
                reserve_full_isl=[True, False, True],
            ),
            arrivals(9),
            random(0.05),
        ),
        "chunking off": (
            with_engines(
                params,
                enable_chunked_prefill=[False, False, True],
                max_num_batched_tokens=[160, 512, 40],
                usable_blocks=[30, 40, 40],
                long_prefill_token_threshold=[0, 32, 24],
                latency=[paper, (0.02, 1e-4, 1e-4, 1e-5), (0.01, 0.0, 0.0, 0.0)],
            ),
            arrivals(6),
            random(),
        ),
        "overload": (params, arrivals(30), np.where(rng.random(STEPS) < 0.9, 1, random())),
        "few seats": (
            with_engines(params, max_model_len=[64, 100, 8192], max_num_seqs=[1, 3, 64]),
            arrivals(3),
            random(),
        ),
        "one expert": (with_engines(params, usable_blocks=[34] * 3), arrivals(1.5), np.zeros(STEPS, int)),
        # Everything on one grid of dyadic times: arrivals meet each other and the iterations' boundaries.
        "on boundaries": (
            with_engines(
                params, latency=[(2 * tick, 0.0, 0.0, 0.0), (tick, 2.0**-12, 2.0**-10, 0.0), (tick, 0, 0, tick / 64)]
            ),
            grid,
            random(),
        ),
    }


@pytest.fixture(scope="module")
def runs():
    """Name -> inputs, the run, the totals of its episode; the drained oracle, its QoS by step and of the drain."""
    with jax.enable_x64(True):
        env, params = jaxroute.make("paper-3", slots=SLOTS, episode_length=EPISODE, metrics="exact")
        scenarios = {}
        for name, (changed, times, actions) in _scenarios(params).items():
            workload = Workload.create(TraceArrivals.create(times), params.workload.requests)
            scenarios[name] = (changed.replace(workload=workload), np.diff(times), actions)
        result = batch_of_runs(env, [s[0] for s in scenarios.values()], [s[2] for s in scenarios.values()], seed=3)
    cases = {}
    for (name, (params, gaps, actions)), run in zip(scenarios.items(), result, strict=True):
        cluster, qos = oracle(env, params, run, range(EPISODE), actions, gaps)
        totals = jax.tree.map(lambda leaf: leaf[EPISODE - 1], run.info["episode"])
        cases[name] = SimpleNamespace(
            env=env, params=params, run=run, actions=actions, gaps=gaps, totals=totals, cluster=cluster, qos=qos
        )
        cases[name].drained = cluster.drain()
    return cases


NAMES = ("paper", "tight memory", "chunking off", "overload", "few seats", "one expert", "on boundaries")


@pytest.fixture(params=NAMES)
def case(runs, request):
    return runs[request.param]


def test_the_scenarios_contain_what_they_are_for(runs):
    tight, unchunked = runs["tight memory"].cluster, runs["chunking off"].cluster
    assert all(expert.preemptions > 3 for expert in tight.experts)
    assert tight.count("rejected_infeasible", 0) > 3
    assert unchunked.count("rejected_infeasible", 0) > 3 and unchunked.count("completed", 0) > 10
    assert runs["overload"].cluster.count("rejected_full", 1) > 30
    seats = runs["few seats"]
    too_long = [seats.run.request(step).prompt >= 64 for step in range(EPISODE)]
    assert (
        sum(np.logical_and(too_long, seats.actions[:EPISODE] == 0)) == seats.cluster.count("rejected_infeasible", 0) > 3
    )
    cut = [fate for fate in seats.cluster.fates if fate.served and fate.served.length == 100]
    assert len(cut) > 3
    assert all(expert.margin == 0 for expert in runs["on boundaries"].cluster.experts)
    for name in NAMES[:-1]:  # a violation and a met limit each
        fates = runs[name].cluster.fates
        assert any(fate.violated for fate in fates) and any(fate.qos > 0 for fate in fates), name


def test_qos_of_every_step(case):
    np.testing.assert_allclose(case.run.info["qos"][:EPISODE], case.qos, **CLOSE)


def test_timings_of_every_request(case):
    for row, timing in zip(case.totals.timing_record, TIMINGS, strict=True):
        wanted = [getattr(fate, timing) for fate in case.cluster.fates]
        np.testing.assert_allclose(row, np.asarray(wanted, float), err_msg=timing, **CLOSE)


def _per_expert(cluster: Any, value: Any) -> np.ndarray:
    """float [N]: the sum of value(fate) over each expert's completed requests."""
    sums = np.zeros(len(cluster.experts))
    for fate in cluster.fates:
        if fate.status == "completed":
            sums[fate.expert] += value(fate)
    return sums


def test_totals_of_the_episode(case):
    totals, cluster = case.totals, case.cluster
    experts = range(3)
    assert totals.arrived == EPISODE
    assert totals.dropped == cluster.count("dropped")
    for status in ("rejected_full", "rejected_infeasible", "completed"):
        counts = [cluster.count(status, expert) for expert in experts]
        np.testing.assert_array_equal(getattr(totals, status), counts, err_msg=status)
    np.testing.assert_array_equal(totals.violations, _per_expert(cluster, lambda fate: fate.violated))
    np.testing.assert_array_equal(totals.preemptions, [expert.preemptions for expert in cluster.experts])
    np.testing.assert_array_equal(totals.several_tokens, _per_expert(cluster, lambda fate: fate.tpot is not None))
    np.testing.assert_allclose(totals.qos, _per_expert(cluster, lambda fate: fate.qos), **CLOSE)
    np.testing.assert_allclose(totals.score, _per_expert(cluster, lambda fate: fate.score), **CLOSE)
    for row, timing in zip(totals.timings, TIMINGS, strict=True):
        wanted = _per_expert(cluster, lambda fate, timing=timing: getattr(fate, timing) or 0.0)
        np.testing.assert_allclose(row, wanted, err_msg=timing, **CLOSE)
    np.testing.assert_allclose(totals.drained_qos, case.drained, **CLOSE)
    np.testing.assert_allclose(totals.elapsed, cluster.elapsed(), **CLOSE)
    before_drain = case.run.info["episode"].elapsed[: EPISODE - 1]
    np.testing.assert_allclose(before_drain, np.cumsum(case.gaps)[:-1], **CLOSE)
    np.testing.assert_allclose(totals.busy, [expert.busy for expert in cluster.experts], **CLOSE)
    # Blocks in use are taken as growing linearly within a run of decodes.
    block_seconds = [expert.block_seconds for expert in cluster.experts]
    np.testing.assert_allclose(totals.block_seconds, block_seconds, rtol=0.02)
    np.testing.assert_allclose(totals.block_seconds.sum(), sum(block_seconds), rtol=0.01)


def test_everything_that_arrived_is_somewhere_at_every_step(case):
    totals = case.run.info["episode"]
    in_system = case.env.queue_lengths(case.run.before)[1:].sum(axis=1)
    rejected = (totals.rejected_full + totals.rejected_infeasible).sum(axis=1)
    found = totals.completed.sum(axis=1) + totals.dropped + rejected
    np.testing.assert_array_equal(totals.arrived, np.arange(STEPS) % EPISODE + 1)
    np.testing.assert_array_equal(found[:-1] + in_system, totals.arrived[:-1])
    assert in_system[EPISODE - 1] == 0 and found[EPISODE - 1] == EPISODE


def test_masked_actions_are_those_the_prompt_or_the_slots_rule_out(case):
    """The mask of each step is by the plain rules on what a router may know; what it bars would have been rejected."""
    masks = case.run.observation.action_mask[: EPISODE - 1]
    lengths = case.env.queue_lengths(case.run.before)
    configs = configs_of(case.params.engines)
    for step, mask in enumerate(masks, start=1):
        prompt = int(case.run.before.request.prompt_tokens[step])
        allowed = [
            length < SLOTS
            and -(-prompt // config["block_size"]) < config["num_gpu_blocks"]
            and prompt < config["max_model_len"]
            and (config["enable_chunked_prefill"] or prompt <= config["max_num_batched_tokens"])
            for config, length in zip(configs, lengths[step], strict=True)
        ]
        np.testing.assert_array_equal(mask, [*allowed, True])
        if not mask[case.actions[step]]:
            assert case.cluster.fates[step].status.startswith("rejected")


def test_rewards_and_the_drain_add_up_to_the_qos_of_the_episode(case):
    run = case.run
    weight = float(case.params.penalty_weight)
    gained = (run.reward + weight * run.info["penalty"])[:EPISODE].sum()
    np.testing.assert_allclose(gained + case.totals.drained_qos, case.totals.qos.sum(), **CLOSE)
    assert case.totals.qos.sum() <= case.totals.score.sum()


def test_penalty_of_every_step(case):
    limit = float(case.params.latency_limit)
    wanted = wanted_penalties(case.params, case.run, case.cluster, limit, lambda queue, _: impact.predicted(queue))
    np.testing.assert_allclose(case.run.info["penalty"][:EPISODE], wanted, **CLOSE)


def test_an_episode_is_truncated_at_its_length_and_the_next_one_starts_afresh(case):
    run = case.run
    np.testing.assert_array_equal(np.flatnonzero(run.truncated), [EPISODE - 1])
    assert not run.terminated.any()
    fresh = jax.tree.map(lambda leaf: leaf[EPISODE], run.before)
    assert fresh.step == 0
    assert fresh.workload.cursor == 1
    assert fresh.engines.num_requests.sum() == 0 and fresh.engines.num_running.sum() == 0
    # The totals stay for whoever wants them until the first step, which begins new ones.
    first = jax.tree.map(lambda leaf: leaf[EPISODE], run.info["episode"])
    done = first.completed.sum()
    assert (
        first.arrived == 1 and done + first.rejected_full.sum() + first.rejected_infeasible.sum() + first.dropped <= 1
    )
    assert np.isfinite(first.timing_record[0]).sum() == done
    np.testing.assert_allclose([first.elapsed, first.qos.sum()], [case.gaps[0], run.info["qos"][EPISODE]], **CLOSE)
    # The next episode's schedule is that of an idle cluster, and of the trace from its start.
    steps = range(EPISODE, STEPS)
    _, qos = oracle(case.env, case.params, run, steps, case.actions, case.gaps[: len(steps)])
    np.testing.assert_allclose(run.info["qos"][EPISODE:], qos, **CLOSE)


def test_summary_is_numpy_on_the_reference(case):
    cluster = case.cluster
    completed = [fate for fate in cluster.fates if fate.status == "completed"]
    busy = np.asarray([expert.busy for expert in cluster.experts])
    blocks = np.asarray([expert.block_seconds for expert in cluster.experts])
    usable = np.asarray([expert.engine.usable_blocks for expert in cluster.experts])
    elapsed, qos = cluster.elapsed(), sum(fate.qos for fate in completed)
    full, infeasible = cluster.count("rejected_full"), cluster.count("rejected_infeasible")
    experts = range(3)
    done = np.asarray([cluster.count("completed", expert) for expert in experts])
    rejected = np.asarray(
        [cluster.count("rejected_full", e) + cluster.count("rejected_infeasible", e) for e in experts]
    )
    routed = done + rejected
    wanted: dict[str, Any] = {
        "qos": qos / EPISODE,
        "goodput": sum(not fate.violated for fate in completed) / elapsed,
        "cost": 0,  # and nobody gives up: test_environment_qos.py has others
        "abandon_rate": 0,
        "score": np.mean([fate.score for fate in completed]),
        "violation_rate": np.mean([fate.violated for fate in completed]),
        "drop_rate": cluster.count("dropped") / EPISODE,
        "rejection_rate": (full + infeasible) / EPISODE,
        "full_rejection_rate": full / EPISODE,
        "preemptions": sum(expert.preemptions for expert in cluster.experts),
        "utilization": busy.mean() / elapsed,
        "qos_per_busy_second": qos / busy.sum(),
        "expert_share": routed / EPISODE,
        "expert_preemptions": [expert.preemptions for expert in cluster.experts],
        "expert_utilization": busy / elapsed,
    }
    for timing in TIMINGS:
        values = [getattr(fate, timing) for fate in completed]
        values = np.asarray([value for value in values if value is not None])
        wanted[timing] = values.mean()
        for quantile in (50, 95, 99):
            wanted[f"{timing}_p{quantile}"] = np.percentile(values, quantile)
    with np.errstate(invalid="ignore", divide="ignore"):  # an expert may have no request at all
        several = _per_expert(cluster, lambda fate: fate.tpot is not None)
        wanted["expert_qos"] = _per_expert(cluster, lambda fate: fate.qos) / routed
        wanted["expert_rejection_rate"] = rejected / routed
        wanted["expert_score"] = _per_expert(cluster, lambda fate: fate.score) / done
        wanted["expert_ttft"] = _per_expert(cluster, lambda fate: fate.ttft) / done
        wanted["expert_tpot"] = _per_expert(cluster, lambda fate: fate.tpot or 0.0) / several
        per_block_second = _per_expert(cluster, lambda fate: fate.qos) / blocks
        wanted["expert_latency_per_token"] = _per_expert(cluster, lambda fate: fate.latency_per_token) / done
        wanted["expert_violation_rate"] = _per_expert(cluster, lambda fate: fate.violated) / done
        wanted["expert_qos_per_busy_second"] = _per_expert(cluster, lambda fate: fate.qos) / busy
    approximate = {
        "kv_use": (blocks / usable).mean() / elapsed,
        "qos_per_block_second": qos / blocks.sum(),
        "expert_kv_use": blocks / usable / elapsed,
        "expert_qos_per_block_second": per_block_second,
    }
    with jax.enable_x64(True):
        summary = jax.device_get(summarize(jax.tree.map(jnp.asarray, case.totals), "exact"))
    assert summary.keys() == wanted.keys() | approximate.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(summary[name], value, err_msg=name, **CLOSE)
    for name, value in approximate.items():
        np.testing.assert_allclose(
            summary[name], value, err_msg=name, rtol=0.02 if name.startswith("expert_") else 0.01
        )


def test_one_expert_finishes_as_replay_does(runs):
    case = runs["one expert"]
    times = np.concatenate([[0.0], np.cumsum(case.gaps)])
    requests = [case.run.request(step) for step in range(EPISODE)]
    accepted = [i for i, fate in enumerate(case.cluster.fates) if fate.status == "completed"]
    assert len(accepted) > 0.9 * EPISODE
    spec = {
        "config": configs_of(case.params.engines)[0],
        "requests": [
            {"arrival_time": times[i], "prompt_len": requests[i].prompt, "output_len": requests[i].output[0]}
            for i in accepted
        ],
    }
    with jax.enable_x64(True):
        recorded = replay(spec)
    assert recorded["status"] == "ok"
    assert recorded["summary"]["preemptions"] == case.totals.preemptions[0] > 3
    outcome = [recorded["per_request"][str(position)] for position in range(len(accepted))]
    latency, ttft, _ = case.totals.timing_record[:, accepted]
    finish = times[accepted] + latency * [request["emitted"] for request in outcome]
    np.testing.assert_allclose(finish, [request["finish_time"] for request in outcome], rtol=1e-9)
    np.testing.assert_allclose(times[accepted] + ttft, [request["first_token_time"] for request in outcome], rtol=1e-9)
