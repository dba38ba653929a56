"""The environment as it comes, in float32 and vmapped: streams, truncation, observations, metrics, no retracing."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment import few_slots
from jaxroute.environment.metrics import summarize
from jaxroute.environment.observation import flatten
from jaxroute.environment.registry import make_params
from jaxroute.errors import UserError
from tests.rollouts import CHEAP_COMPILE, Run, oracle

pytestmark = pytest.mark.usefixtures("optimised_programs")

EPISODE, STEPS, SLOTS = 150, 190, 24
RATES = [3.0, 3.0, 3.0, 6.0, 25.0]  # requests/s of each environment
LIMITS = [0.03, 0.03, 0.04, 0.03, 0.03]  # s per token
STREAMS = [0, 0, 0, 1, 2]  # environments of one stream get the same keys


def _sweep(params: Any) -> Any:
    """`params` with a batch axis, of which each environment has its own rate and limit."""
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(RATES)), params)
    arrivals = batch.workload.arrivals.replace(rate=jnp.asarray(RATES))
    workload = batch.workload.replace(arrivals=arrivals)
    return batch.replace(workload=workload, latency_limit=jnp.asarray(LIMITS))


def _keys() -> jax.Array:
    """[1 + STEPS, environments], of the reset and the steps."""
    streams = jax.random.split(jax.random.key(11), (1 + STEPS, 1 + max(STREAMS)))
    return streams[:, jnp.asarray(STREAMS)]


ACTIONS = np.random.default_rng(5).integers(0, 4, (STEPS, len(RATES)))


def _run(env: Any, params: Any, **options: Any) -> SimpleNamespace:
    """STEPS steps of the batch: `run` (fields [STEPS, environments]), the reset, the jitted step and its traces."""
    traces = []

    def traced(*inputs: Any) -> Any:
        traces.append(inputs)
        return env.step(*inputs)

    step = jax.jit(jax.vmap(traced), **options)
    keys = _keys()
    first, state = jax.jit(jax.vmap(env.reset), **options)(keys[0], params)
    reset, steps = state, []
    for key, actions in zip(keys[1:], jnp.asarray(ACTIONS, jnp.int32), strict=True):
        observation, after, *others = step(key, state, actions, params)
        steps.append(Run(state, observation, *others))
        state = after
    run = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(steps))
    return SimpleNamespace(env=env, run=run, first=first, reset=reset, state=state, step=step, traces=traces)


@pytest.fixture(scope="module")
def params():
    return _sweep(jaxroute.make("paper-3")[1])


@pytest.fixture(scope="module")
def default(params):
    return _run(jaxroute.make("paper-3", slots=SLOTS, episode_length=EPISODE)[0], params)


@pytest.fixture(scope="module")
def bare(params):
    """Longer episodes, flat observations and no metrics, on the same keys and actions."""
    env, _ = jaxroute.make("paper-3", slots=SLOTS, episode_length=1000, obs="flat", metrics="off")
    return _run(env, params, compiler_options=CHEAP_COMPILE)


def _flat(observation: Any) -> np.ndarray:
    """Graph observations [..., fields] as vectors [..., F]."""
    axes = observation.action_mask.ndim - 1
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(observation)]
    return np.concatenate([leaf.reshape(*leaf.shape[:axes], -1) for leaf in leaves], axis=-1)


def _equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_same_keys_are_the_same_requests_whatever_the_actions(default):
    before, totals = default.run.before, default.run.info["episode"]
    assert (ACTIONS[:, 0] != ACTIONS[:, 1]).mean() > 0.5
    for other in (1, 2):
        _equal(*(jax.tree.map(lambda leaf, i=i: leaf[:, i], before.request) for i in (0, other)))
        # Where an episode ends, its time includes the drain, which does depend on the actions.
        elapsed = totals.elapsed[~default.run.truncated[:, 0]]
        np.testing.assert_array_equal(elapsed[:, 0], elapsed[:, other])
    assert (before.request.prompt_tokens[:, 3] != before.request.prompt_tokens[:, 0]).mean() > 0.5
    assert (default.run.info["qos"][:, 0] != default.run.info["qos"][:, 1]).any()


def test_params_are_traced(default, params):
    """The step that ran with one set of parameters takes others, and they matter."""
    reward = default.run.reward
    assert reward[:EPISODE, 2].sum() > reward[:EPISODE, 1].sum()  # the same stream under a looser limit
    changed = params.replace(latency_limit=params.latency_limit * 2, penalty_weight=params.penalty_weight * 0)
    changed = changed.replace(engines=changed.engines.replace(usable_blocks=changed.engines.usable_blocks // 20))
    default.step(_keys()[1], default.state, jnp.zeros(len(RATES), jnp.int32), changed)
    assert len(default.traces) == 1


def test_truncation_and_reset(default, bare):
    run = default.run
    np.testing.assert_array_equal(run.truncated.T, [np.arange(STEPS) == EPISODE - 1] * len(RATES))
    assert not run.terminated.any() and not bare.run.terminated.any() and not bare.run.truncated.any()
    after = jax.tree.map(lambda leaf: leaf[EPISODE], run.before)
    # The state is that of a reset, but for the request at hand and for what stands in slots out of use.
    fresh = jax.device_get(default.reset).replace(request=after.request)
    for field in ("workload", "step", "recent_gap", "recent_latency"):
        _equal(getattr(after, field), getattr(fresh, field))
    # Totals stay until the next episode's first step, and begin anew with it.
    _equal(after.totals, jax.tree.map(lambda leaf: leaf[EPISODE - 1], run.info["episode"]))
    np.testing.assert_array_equal(run.info["episode"].arrived[EPISODE], 1)
    assert (run.info["episode"].timing_record[EPISODE].sum(axis=-1) <= 1).all()
    for field in ("num_requests", "num_running", "clock"):
        _equal(getattr(after.engines, field), getattr(fresh.engines, field))
    observation = jax.vmap(default.env.observe)
    params = _sweep(jaxroute.make("paper-3")[1])
    wanted = jax.device_get(jax.jit(observation, compiler_options=CHEAP_COMPILE)(fresh, params))
    got = jax.tree.map(lambda leaf: leaf[EPISODE - 1], run.observation)
    np.testing.assert_allclose(_flat(got), _flat(wanted), rtol=1e-5, atol=1e-6)


def test_final_observation_is_what_a_longer_episode_goes_on_with(default, bare):
    final = _flat(default.run.info["final_observation"])
    observed = _flat(default.run.observation)
    np.testing.assert_allclose(final[:EPISODE], bare.run.observation[:EPISODE], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(bare.run.info["final_observation"], bare.run.observation)
    same = np.isclose(final, observed).all(axis=-1)
    np.testing.assert_array_equal(same.T, ~default.run.truncated.T)


def test_metrics_off_gives_the_same_rewards(default, bare):
    assert bare.run.info["episode"] is None and bare.state.totals is None
    for field in ("qos", "penalty"):
        np.testing.assert_allclose(
            default.run.info[field][:EPISODE], bare.run.info[field][:EPISODE], rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(default.run.reward[:EPISODE], bare.run.reward[:EPISODE], rtol=1e-5, atol=1e-6)


def test_percentiles_of_the_histogram_are_near_the_references(default, params):
    run, env = default.run, default.env
    totals = jax.tree.map(lambda leaf: leaf[EPISODE - 1], run.info["episode"])
    gap = jax.vmap(lambda p, key, state: p.workload.sample(jax.random.split(key)[0], state)[1])
    gaps = jax.jit(jax.vmap(gap, (None, 0, None)))(params, _keys()[1 : EPISODE + 1], default.state.workload)
    gaps = np.asarray(gaps)
    np.testing.assert_allclose(gaps[:-1].sum(axis=0), run.info["episode"].elapsed[EPISODE - 2], rtol=1e-5)
    summary = jax.device_get(jax.vmap(lambda one: summarize(one, "histogram"))(totals))
    for i in range(len(RATES)):
        of_one = jax.tree.map(lambda leaf, i=i: leaf[:, i], run)
        its_params = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        cluster, _ = oracle(env, its_params, of_one, range(EPISODE), ACTIONS[:, i], gaps[:, i])
        cluster.drain()
        assert totals.completed[i].sum() == cluster.count("completed") == totals.timing_record[i, 0].sum()
        assert totals.rejected_full[i].sum() == cluster.count("rejected_full")
        np.testing.assert_allclose(totals.qos[i].sum(), sum(fate.qos for fate in cluster.fates), rtol=1e-4)
        for timing in ("latency_per_token", "ttft", "tpot"):
            values = [getattr(fate, timing) for fate in cluster.fates]
            values = np.asarray([value for value in values if value is not None])
            np.testing.assert_allclose(summary[timing][i], values.mean(), rtol=1e-4)
            for quantile in (50, 95, 99):
                wanted = np.percentile(values, quantile)  # interpolated between two requests
                np.testing.assert_allclose(summary[f"{timing}_p{quantile}"][i], wanted, rtol=0.02)


def test_observations_are_finite_and_normalised(default, bare):
    flat = _flat(default.run.observation)
    assert flat.shape[-1] == bare.run.observation.shape[-1] == 2 + 3 * 13 + 2 * 3 * 10 * 7 + 2 * 3 * 10 + 4
    assert np.isfinite(flat).all() and np.abs(flat).max() < 5
    observation = default.run.observation
    assert observation.action_mask[..., -1].all()
    full = default.env.queue_lengths(default.run.before)[1:] == SLOTS
    assert full.any() and not observation.action_mask[:-1, :, :-1][full].any()
    running = np.minimum(default.run.before.engines.num_running[1:], 10)
    np.testing.assert_array_equal(observation.running_mask[:-1].sum(axis=-1), running)
    for name in ("running", "waiting"):
        nodes, mask = getattr(observation, name), getattr(observation, f"{name}_mask")
        assert mask.any() and not nodes[~mask].any()
    graph = jax.tree.map(lambda leaf: jnp.asarray(leaf[7, 0]), observation)
    np.testing.assert_array_equal(flatten(graph), flat[7, 0])


def test_all_queue_nodes_are_every_request_at_each_expert(default, params):
    states = jax.tree.map(lambda leaf: leaf[1:], default.run.before)
    env = replace(default.env, queue_nodes="all")
    see = jax.jit(jax.vmap(jax.vmap(env.observe), in_axes=(0, None)))
    whole, cut = jax.device_get(see(states, params)), jax.tree.map(lambda leaf: leaf[:-1], default.run.observation)
    np.testing.assert_array_equal(whole.running_mask.sum(axis=-1), states.engines.num_running)
    held = whole.running_mask | whole.waiting_mask
    np.testing.assert_array_equal(held.sum(axis=-1), states.engines.num_requests)
    assert held.shape[-1] == SLOTS and not (whole.running_mask & whole.waiting_mask).any()
    assert (held.sum(axis=-1) > 20).any(), "never more than the ten of each queue"
    assert not whole.queued[~held].any()
    # All else is what ten nodes of each queue show, in the same order: features that are relative to K too.
    for name in ("arrived", "expert", "action_mask"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))
    for queue in ("running", "waiting"):
        mask = getattr(whole, f"{queue}_mask")
        shown = mask & (mask.cumsum(axis=-1) <= 10)
        np.testing.assert_array_equal(whole.queued[shown], getattr(cut, queue)[getattr(cut, f"{queue}_mask")])
    one = jax.tree.map(lambda leaf: leaf[5, 0], whole)
    assert env.observation_space().contains(one)
    flat = replace(env, obs="flat").observation_space()
    assert flat.contains(flatten(jax.tree.map(jnp.asarray, one))) and flat.shape[0] == 2 + 3 * 13 + 3 * SLOTS * 9 + 4


def test_recent_load_is_0_until_a_gap_is_known(default, params):
    gap, env = default.run.before.recent_gap[1:], default.env
    node_time = np.asarray(params.latency_limit * params.token_scale) / env.num_experts / env.queue_nodes
    wanted = np.where(default.run.before.step[1:] > 0, node_time / (node_time + gap), 0)
    np.testing.assert_allclose(default.run.observation.arrived[:-1, :, 1], wanted, rtol=1e-5)
    assert (wanted[EPISODE - 1] == 0).all() and (wanted > 0.1).any()


def test_observations_do_not_tell_the_truth(default, params):
    """Neither observations nor masks depend on the true lengths and scores, which a perturbation shows."""
    states = default.run.before
    env = default.env
    see = jax.jit(jax.vmap(jax.vmap(env.observe), in_axes=(0, None)))
    seen = jax.device_get(see(states, params))
    rng = np.random.default_rng(0)
    anything = lambda leaf: rng.permutation(leaf.ravel()).reshape(leaf.shape) * 1.7  # noqa: E731
    lengths = lambda leaf: rng.integers(1, 10_000, leaf.shape, dtype=np.int32)  # noqa: E731
    request, engines, queued = states.request, states.engines, states.queued
    others = states.replace(
        request=request.replace(
            output_tokens=lengths(request.output_tokens), score=anything(request.score).astype(np.float32)
        ),
        engines=engines.replace(target_tokens=lengths(engines.target_tokens)),
        queued=queued.replace(score=anything(queued.score).astype(np.float32)),
    )
    _equal(seen, jax.device_get(see(others, params)))
    for told in (
        states.replace(request=request.replace(predicted_score=request.predicted_score + 0.1)),
        states.replace(queued=queued.replace(predicted_tokens=queued.predicted_tokens + 9)),
    ):
        assert (_flat(jax.device_get(see(told, params))) != _flat(seen)).any()


def test_floats_are_float32(default):
    leaves = jax.tree.leaves((default.run, default.first, default.reset))
    kinds = {leaf.dtype for leaf in leaves}
    assert kinds == {np.dtype(np.float32), np.dtype(np.int32), np.dtype(bool)}


def test_environments_are_values():
    env, params = jaxroute.make("paper-6", slots=16)
    assert (env.num_experts, env.num_actions, env.episode_length) == (6, 7, 5000)
    for other in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env), jaxroute.make("paper-6", slots=16)[0]):
        assert other == env and hash(other) == hash(env)
    assert env != jaxroute.make("paper-6", slots=17)[0]
    _equal(copy.deepcopy(params), params)
    _equal(pickle.loads(pickle.dumps(params)), params)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jaxroute.make("paper-4"), ("paper-4", "paper-3", "paper-6")),
        (lambda: jaxroute.make("paper-3", slot=3), ("slot", "slots")),
        (lambda: jaxroute.make("paper-3", num_experts=3), ("num_experts",)),
        (lambda: jaxroute.make("paper-3", queue_nodes="every"), ("queue_nodes", "at least 1, or 'all'", "'every'")),
        (lambda: jaxroute.make("paper-3", slots="all"), ("slots must be a whole number of at least 1, not 'all'",)),
        (lambda: make_params(["alpaca-native"], latency_limit=0.0), ("latency_limit", "above 0")),
        (lambda: make_params(["alpaca-native"], latency_limit=-1.0), ("latency_limit", "-1.0")),
        (lambda: make_params(["alpaca-native"], latency_limit=float("nan")), ("latency_limit", "nan")),
        (lambda: make_params(["alpaca"]), ("alpaca", "alpaca-native")),
        (lambda: make_params(["alpaca-native"], profile="papers"), ("papers", "paper")),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_working_on_few_slots_changes_nothing(monkeypatch):
    """All slots at once, or the first few of them where those hold all requests: the same but for rounding."""
    env, params = jaxroute.make("paper-3", slots=24, episode_length=150)
    arrivals = params.workload.arrivals.replace(rate=jnp.asarray(7.0))
    params = params.replace(workload=params.workload.replace(arrivals=arrivals))

    def rollout():
        def step(carry, key):
            keys, (observation, state) = jax.random.split(key, 2), carry
            action = jax.random.randint(key, (2,), 0, 4)
            observation, state, *rest = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
            return (observation, state), (observation, state.engines.num_requests, rest)

        start = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(1), 2), params)
        return jax.device_get(jax.lax.scan(step, start, jax.random.split(jax.random.key(2), 200))[1])

    results = []
    for few in (6, 24):
        monkeypatch.setattr(few_slots, "FEW_SLOTS", few)
        jax.clear_caches()  # of steps that were traced with the other number
        results.append(jax.jit(rollout, compiler_options=CHEAP_COMPILE)())
    jax.clear_caches()
    longest = results[0][1].max(axis=(1, 2))
    assert (longest < 6).sum() > 20 and (longest >= 6).sum() > 20
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        close = {"rtol": 1e-5, "atol": 1e-6} if np.issubdtype(one.dtype, np.floating) else {"rtol": 0}
        np.testing.assert_allclose(one, other, **close)
