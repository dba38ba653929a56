"""Action impact estimators, planning routers and recent figures, in all states of two runs, against plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.few_slots import FEW_SLOTS
from jaxroute.environment.impact import Queue, exact_impact, paper_impact, predicted_impact
from jaxroute.environment.observation import action_mask
from jaxroute.environment.qos import QosRule
from jaxroute.routers import make_router
from jaxroute.simulator.engine import empty_engine
from jaxroute.simulator.engine_config import engine_from_config
from jaxroute.workload.arrivals import TraceArrivals
from jaxroute.workload.workload import Workload
from tests.reference import impact
from tests.reference.cluster import Cluster, Expert
from tests.rollouts import CHEAP_COMPILE, batch_of_runs, configs_of, oracle, queue_of, wanted_penalties, with_engines

STEPS, SLOTS = 120, 24
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def _cases(form):
    """(params, run, oracle) of two clusters with this penalty: the paper's, and one short of memory and seats."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        env, params = jaxroute.make("paper-3", slots=SLOTS, episode_length=STEPS + 1, penalty=form, metrics="off")
        params = params.replace(penalty_prefill=jnp.asarray([7.2e-5, 6.8e-5, 1e-4]))
        tight = with_engines(
            params,
            usable_blocks=[20, 36, 90],
            block_size=[16, 16, 5],
            max_num_seqs=[64, 3, 64],
            max_num_batched_tokens=[512, 2048, 64],
        )
        scenarios, times, actions = [], [], []
        for base, rate, limit in ((params, 6.0, 0.035), (tight, 5.0, 0.05)):
            times.append(np.cumsum(rng.exponential(1 / rate, STEPS + 1)))
            workload = Workload.create(TraceArrivals.create(times[-1]), base.workload.requests)
            scenarios.append(base.replace(workload=workload, latency_limit=jnp.asarray(limit)))
            actions.append(rng.integers(0, 4, STEPS))
        runs = batch_of_runs(env, scenarios, actions, seed=0)
    cases = []
    for params, run, at, acts in zip(scenarios, runs, times, actions, strict=True):
        cluster, qos = oracle(env, params, run, range(STEPS), acts, np.diff(at))
        np.testing.assert_allclose(run.reward, np.asarray(qos) - run.info["penalty"], **CLOSE)
        cases.append((params, run, cluster))
    return cases


@pytest.fixture(scope="module")
def exact_cases():
    return _cases("exact")


def test_paper_form_as_the_penalty():
    for params, run, cluster in _cases("paper"):
        limit, k1, k2 = (
            float(params.latency_limit),
            np.asarray(params.penalty_prefill),
            np.asarray(params.penalty_context),
        )
        estimator = lambda queue, e, k1=k1, k2=k2: impact.paper(queue, k1[e], k2[e])  # noqa: E731
        wanted = wanted_penalties(params, run, cluster, limit, estimator)
        assert (wanted > 0).sum() > 5
        np.testing.assert_allclose(run.info["penalty"], wanted, **CLOSE)


def test_exact_form_as_the_penalty(exact_cases):
    charged = 0
    for params, run, cluster in exact_cases:
        limit = float(params.latency_limit)
        wanted = wanted_penalties(params, run, cluster, limit, lambda queue, _: impact.exact(queue))
        charged += (wanted > 0).sum()
        np.testing.assert_allclose(run.info["penalty"], wanted, **CLOSE)
    assert charged > 3


def _all_forms(params, state, limits):
    """float [3 forms, N]: the impact on each expert, by the paper's, the predicted and the exact form; `limits` [N]."""
    request, queued = state.request, state.queued
    queue = Queue(
        engine=state.engines,
        age=-queued.arrival,
        score=queued.score,
        predicted_score=queued.predicted_score,
        predicted_tokens=queued.predicted_tokens,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.predicted_output_tokens,
    )
    k1, k2, true_tokens = params.penalty_prefill, params.penalty_context, state.engines.target_tokens
    rule = QosRule(limits)
    paper = paper_impact(queue.replace(output_tokens=request.output_tokens), true_tokens, k1, k2, rule)
    ours = [form(queue, rule, params.engines) for form in (predicted_impact, exact_impact)]
    return jnp.stack([paper, *ours])


def _misled(run):
    """The run with predictions of some queued requests far off: passed already, or more than the KV cache holds."""
    queued = run.before.queued
    factor = np.random.default_rng(4).choice([0.3, 1.0, 4.0], queued.predicted_tokens.shape)
    tokens = np.maximum(queued.predicted_tokens * factor, 1).astype(np.int32)
    return run._replace(before=run.before.replace(queued=queued.replace(predicted_tokens=tokens)))


def _limits(forms, count=8):
    """Limits between the latencies with and without the joining request: of each form, for up to `count` requests."""
    limits = []
    for latencies in forms:
        between = [(without + joined) / 2 for _, without, joined in latencies if without < joined < np.inf]
        limits += (between[::-1] + [0.03] * count)[:count]
    return limits


def test_all_forms_in_many_states_at_limits_that_decide(exact_cases):
    steps = np.arange(5, STEPS, 6)
    program = jax.jit(
        jax.vmap(jax.vmap(_all_forms, (None, None, 0)), (None, 0, 0)),
        compiler_options=CHEAP_COMPILE,
    )
    charged, never_fit = np.zeros(3), 0
    for params, run, _ in exact_cases:
        run = _misled(run)
        k1, k2 = np.asarray(params.penalty_prefill), np.asarray(params.penalty_context)
        limits, wanted = [], []
        for step in steps:
            for expert in range(3):
                queue = queue_of(params, run, step, expert)
                cache = (queue.config["num_gpu_blocks"] - 1) * queue.config["block_size"]
                never_fit += any(entry.prompt + entry.expected_tokens - 1 > cache for entry in queue.requests)
                forms = [impact.paper(queue, k1[expert], k2[expert]), impact.predicted(queue), impact.exact(queue)]
                limits.append(_limits(forms[1:]))
                wanted.append([[impact.penalty(form, limit) for limit in limits[-1]] for form in forms])
        limits = np.asarray(limits).reshape(len(steps), 3, -1).swapaxes(1, 2)  # [steps, limits, N]
        wanted = np.asarray(wanted).reshape(len(steps), 3, 3, -1).transpose(0, 3, 2, 1)  # [steps, limits, forms, N]
        with jax.enable_x64(True):
            got = program(params, jax.tree.map(lambda leaf: leaf[steps], run.before), limits)
        np.testing.assert_allclose(got, wanted, **CLOSE)
        charged += (wanted > 0).sum(axis=(0, 1, 3))
    assert (charged > 100).all() and never_fit > 3


def test_exact_impact_ends_when_a_prediction_cannot_fit_the_cache():
    params = engine_from_config({"num_gpu_blocks": 11, "reserve_full_isl": False, "max_num_batched_tokens": 64}, "here")
    nothing = jnp.zeros(4)
    lengths = jnp.ones(4, jnp.int32)
    for prompt in (100, 1000):
        queue = Queue(empty_engine(4), nothing, nothing, nothing, lengths, jnp.int32(prompt), jnp.int32(256))
        assert jax.jit(exact_impact)(queue, QosRule(jnp.float32(0.03)), params) == 0


PLANNED = np.arange(2, STEPS, 3)


def _planner_program(**options):
    """(params, states [B, ...]) -> actions [3, B] of the planning routers; with `options`, of lookahead alone."""
    env = RoutingEnvironment(num_experts=3, slots=SLOTS, **options)
    routers = [make_router(name, env) for name in ("lookahead", "clairvoyant", "block")[: 1 if options else 3]]
    choices = lambda params, state: jnp.stack([router(None, None, state, params) for router in routers])  # noqa: E731
    return jax.jit(jax.vmap(choices, (None, 0), 1), compiler_options=CHEAP_COMPILE)


@pytest.fixture(scope="module")
def planned(exact_cases):
    """For both cases the planners' actions [3, B] at the PLANNED steps; traced once for the two."""
    program = _planner_program()
    with jax.enable_x64(True):
        actions = [jax.device_get(program(params, _states(run, PLANNED))) for params, run, _ in exact_cases]
    assert program._cache_size() == 1
    return actions


def _states(run, steps):
    return jax.tree.map(lambda leaf: leaf[steps], run.before)


def _gains(params, run, step, truth):
    """By plain engines: QoS that the request would add at each expert; -inf where the mask bars it."""
    state = _states(run, step)
    mask, request = np.asarray(action_mask(state, params, SLOTS)), state.request
    gains = []
    for expert, config in enumerate(configs_of(params.engines)):
        queue = queue_of(params, run, step, expert)
        length = queue.true_tokens if truth else queue.predicted_tokens
        own = float((request.score if truth else request.predicted_score)[expert])
        served = Expert(config).can_serve(queue.prompt, length)
        gain = impact.gain(queue, own, float(params.latency_limit), truth) if served else 0.0
        gains.append(gain if mask[expert] else -np.inf)
    return np.asarray(gains)


def test_planners_take_the_best_gain_of_plain_engines(exact_cases, planned):
    counts = np.zeros(4, int)
    for (params, run, _), actions in zip(exact_cases, planned, strict=True):
        for truth, chosen in zip((False, True), actions[:2], strict=True):
            for step, action in zip(PLANNED, chosen, strict=True):
                counts[action] += 1
                gains = _gains(params, run, step, truth)
                np.testing.assert_allclose(np.append(gains, 0.0)[action], max(gains.max(), 0.0), **CLOSE)
                assert (action == 3) == (gains.max() <= 1e-12)
    assert (counts > 5).all()


def test_block_takes_the_lowest_latency_of_plain_engines(exact_cases, planned):
    counts = np.zeros(3, int)
    for (params, run, _), actions in zip(exact_cases, planned, strict=True):
        for step, action in zip(PLANNED, actions[2], strict=True):
            counts[action] += 1
            state = _states(run, step)
            mask = np.asarray(action_mask(state, params, SLOTS))[:3]
            latencies = np.full(3, np.inf)
            for expert, config in enumerate(configs_of(params.engines)):
                queue = queue_of(params, run, step, expert)
                if mask[expert] and Expert(config).can_serve(queue.prompt, queue.predicted_tokens):
                    latencies[expert] = impact.joining_latency(queue) * queue.predicted_tokens
            if np.isfinite(latencies).any():
                np.testing.assert_allclose(latencies[action], latencies.min(), **CLOSE)
    assert (counts > 5).all()


def test_a_planner_alone_and_without_drops(exact_cases, planned):
    """A batch with a crowded expert works on all slots, a state without one on few: they choose alike."""
    (params, run, _), actions = exact_cases[1], planned[1]
    program, few, forced = _planner_program(drop=False), [], 0
    for step, action in zip(PLANNED, actions[0], strict=True):
        with jax.enable_x64(True):
            chosen = int(program(params, _states(run, slice(step, step + 1)))[0, 0])
        few.append(bool((run.before.engines.num_requests[step] < FEW_SLOTS).all()))
        if action < 3:
            assert chosen == action
        else:
            gains = _gains(params, run, step, truth=False)
            np.testing.assert_allclose(gains[chosen], gains.max(), **CLOSE)
            forced += 1
    assert any(few) and not all(few) and forced


def test_recent_gap_and_latency(exact_cases):
    for params, run, cluster in exact_cases:
        gaps = np.asarray(params.workload.arrivals.gaps)[1:]
        again = Cluster(configs_of(params.engines), SLOTS, cluster.worth)
        gap, latency, seen = 0.0, np.zeros(3), set()
        for step in range(STEPS):
            np.testing.assert_allclose(run.before.recent_gap[step], gap, **CLOSE)
            np.testing.assert_allclose(run.before.recent_latency[step], latency, **CLOSE)
            expert = cluster.fates[step].expert
            again.step(run.request(step), 3 if expert is None else expert, float(gaps[step]))
            gap += (gaps[step] - gap) / min(step + 1, 32)
            for expert in range(3):
                done = [f for f in again.fates if (f.status, f.expert) == ("completed", expert) and id(f) not in seen]
                seen |= {id(fate) for fate in done}
                if done:
                    kept = 0.9 ** len(done) if latency[expert] else 0.0
                    mean = np.mean([fate.latency_per_token for fate in done])
                    latency[expert] = kept * latency[expert] + (1 - kept) * mean
        assert (latency > 0).all()
