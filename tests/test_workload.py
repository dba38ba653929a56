"""Arrivals and requests: rates, distributions, bounds, replay of traces, and behaviour under jit and vmap."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workload import (
    FrozenRequests,
    PiecewiseArrivals,
    PoissonArrivals,
    Request,
    RequestTable,
    TableRequests,
    TraceArrivals,
    TraceRequests,
    Workload,
    predict_with_frozen_errors,
)

MEANS = (0.7146, 0.7038, 0.6321)
TIMES = np.array([0.0, 0.5, 0.75, 3.0, 4.0])


def stream(workload: Workload, seed: int, count: int) -> tuple[np.ndarray, Request]:
    """Gaps [count] and requests [count, ...] of one run, in order."""

    def step(state, key):
        state, gap, request = workload.sample(key, state)
        return state, (gap, request)

    key, reset_key = jax.random.split(jax.random.key(seed))
    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[1])
    gaps, requests = run(workload.reset(reset_key), jax.random.split(key, count))
    return np.asarray(gaps), jax.tree.map(np.asarray, requests)


def poisson(rate: float = 3.0) -> Workload:
    return Workload.create(PoissonArrivals.create(rate), FrozenRequests.create(MEANS))


def trace(**options) -> Workload:
    return Workload.create(TraceArrivals.create(TIMES, **options), FrozenRequests.create(MEANS))


@pytest.fixture(scope="module")
def frozen() -> tuple[np.ndarray, Request]:
    return stream(poisson(), seed=0, count=100_000)


# Poisson arrivals and the frozen generator


def test_poisson_gaps_are_exponential_with_the_rate(frozen):
    gaps = np.sort(frozen[0])
    assert gaps[0] > 0
    assert gaps.mean() == pytest.approx(1 / 3, rel=0.015)
    # Kolmogorov-Smirnov distance: 1.63 / sqrt(n) is the 1 % point.
    distance = np.abs(1 - np.exp(-3.0 * gaps) - np.arange(len(gaps)) / len(gaps)).max()
    assert distance < 1.63 / math.sqrt(len(gaps))


def test_frozen_types_and_bounds(frozen):
    request = frozen[1]
    for tokens in (request.prompt_tokens, request.output_tokens, request.predicted_output_tokens):
        assert tokens.dtype == np.int32 and tokens.min() == 4 and tokens.max() == 256
    assert frozen[0].dtype == request.score.dtype == request.predicted_score.dtype == np.float32
    assert request.score.min() >= 0 and request.score.max() <= 1
    assert request.score.shape == request.output_tokens.shape == (100_000, 3)


def test_frozen_scores_follow_the_formula(frozen):
    score, predicted = frozen[1].score, frozen[1].predicted_score
    np.testing.assert_allclose(score.mean(0), MEANS, atol=0.0015)
    np.testing.assert_allclose(predicted.mean(0), MEANS, atol=0.0015)
    np.testing.assert_allclose(score.std(0), math.hypot(0.06, 0.08), rtol=0.02)
    np.testing.assert_allclose(predicted.std(0), math.sqrt(0.06**2 + 0.04**2 + 0.028**2), rtol=0.02)
    np.testing.assert_allclose((score - predicted).std(0), math.hypot(0.04, 0.028), rtol=0.02)
    # Two experts share only the first term.
    assert np.cov(score[:, 0], score[:, 1])[0, 1] == pytest.approx(0.06**2, rel=0.05)


def test_frozen_lengths_follow_the_formula(frozen):
    request = frozen[1]

    def bounded_mean(log_mean: float, log_std: float) -> float:
        normals = np.random.default_rng(1).standard_normal(1_000_000)
        return np.floor(np.clip(np.exp(log_mean + log_std * normals), 4, 256)).mean()

    assert request.prompt_tokens.mean() == pytest.approx(bounded_mean(3.9, 0.7), rel=0.01)
    np.testing.assert_allclose(request.output_tokens.mean(0), bounded_mean(4.3, math.hypot(0.5, 0.5)), rtol=0.01)
    np.testing.assert_allclose(
        request.predicted_output_tokens.mean(0), bounded_mean(4.3, math.hypot(0.5, 0.35)), rtol=0.01
    )
    assert np.median(request.output_tokens) == pytest.approx(math.exp(4.3), rel=0.02)
    # Where no bound is near, log truth - log prediction = .15 z, but for rounding down.
    inner = (request.output_tokens > 40) & (request.output_tokens < 200)
    error = np.log(request.output_tokens[inner] / request.predicted_output_tokens[inner])
    assert 0.09 < error.std() < 0.15
    assert abs(np.corrcoef(request.prompt_tokens, request.output_tokens[:, 0])[0, 1]) < 0.02


def test_the_stream_depends_on_the_key_alone():
    first, again, other = (stream(poisson(), seed, 50) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1].score, again[1].score)
    assert not np.array_equal(first[0], other[0])


def test_vmap_over_rates_scales_the_gaps_of_one_key():
    rates = jnp.array([1.0, 2.0, 8.0])
    workloads = Workload(PoissonArrivals(rates), FrozenRequests.create(MEANS))
    axes = Workload(PoissonArrivals(0), FrozenRequests(None))  # pyright: ignore[reportArgumentType]
    key = jax.random.key(0)
    state = workloads.reset(key)
    _, gaps, requests = jax.vmap(lambda workload: workload.sample(key, state), in_axes=(axes,))(workloads)
    np.testing.assert_allclose(gaps * rates, gaps[0], rtol=1e-6)
    assert requests.score.shape == (3, 3) and np.array_equal(requests.score[0], requests.score[2])


@pytest.mark.parametrize("count", [1, 6])
def test_any_number_of_experts(count: int):
    workload = Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create([0.5] * count))
    assert workload.num_experts == count
    assert stream(workload, 0, 2)[1].output_tokens.shape == (2, count)


def test_other_rates_and_means_do_not_retrace():
    traces = 0

    @jax.jit
    def sample(workload, key, state):
        nonlocal traces
        traces += 1
        return workload.sample(key, state)

    state = poisson().reset(jax.random.key(0))
    for rate in (1.0, 2.0, 5.0):
        state, _, _ = sample(poisson(rate), jax.random.key(1), state)
    assert traces == 1


def test_float64_under_x64():
    with jax.enable_x64(True):
        gaps, request = stream(poisson(), 0, 4)
    assert gaps.dtype == request.score.dtype == np.float64
    assert request.output_tokens.dtype == request.prompt_tokens.dtype == np.int32


# Piecewise rates


def test_piecewise_counts_match_the_rates_of_every_piece():
    durations, rates = np.array([2.0, 1.0, 3.0, 0.5]), np.array([4.0, 0.0, 1.0, 20.0])
    workload = Workload.create(PiecewiseArrivals.create(durations, rates), FrozenRequests.create(MEANS))
    gaps, _ = stream(workload, 0, 40_000)
    times = np.cumsum(gaps.astype(np.float64))
    period = durations.sum()
    periods = int(times[-1] // period)
    assert periods > 1000
    inside = times[times < periods * period] % period
    edges = np.concatenate([[0.0], np.cumsum(durations)])
    # The sum of 40,000 float32 gaps drifts by some ms, over which piece borders smear: hence the margin at rate 0.
    counts = np.histogram(inside, edges)[0]
    expected = durations * rates * periods
    assert counts[1] < 0.002 * counts.sum()
    positive = rates > 0
    deviation = np.abs(counts - expected)[positive] / np.sqrt(expected[positive])
    assert (deviation < 4).all()
    # Counts of whole periods are Poisson too: variance = mean.
    per_period = np.bincount((times // period).astype(int))[:periods]
    assert per_period.var() == pytest.approx(per_period.mean(), rel=0.15)


def test_piecewise_gap_inverts_the_cumulative_hazard():
    with jax.enable_x64(True):
        arrivals = PiecewiseArrivals.create([2.0, 1.0, 4.0], [1.0, 0.0, 0.5])  # hazard 4 in a period of 7 s
        state = arrivals.reset(jax.random.key(0))

        def arrive(hazard: float) -> float:
            nonlocal state
            state, gap, _ = arrivals.next(jnp.exp(-jnp.array([hazard])), state)
            return float(gap)

        assert arrive(1.5) == pytest.approx(1.5)  # at 1.5
        assert arrive(1.0) == pytest.approx(2.5)  # .5 used up at 2, then a silent second, then .5 more: at 4
        assert arrive(1.5 + 4.0 + 1.0) == pytest.approx(3.0 + 7.0 + 1.0)  # two borders and a whole period on
        assert arrive(0.25) == pytest.approx(0.25)
        assert int(state.cursor) == 0 and float(state.phase) == pytest.approx(1.25)


def test_one_piece_is_a_poisson_process_and_keeps_a_bounded_phase():
    arrivals = PiecewiseArrivals.create([10.0], [2.0])

    def step(state, uniforms):
        state, gap, _ = arrivals.next(uniforms, state)
        return state, (gap, state.phase)

    uniforms = jax.random.uniform(jax.random.key(0), (20_000, 1), minval=1e-7)
    gaps, phases = jax.jit(lambda: jax.lax.scan(step, arrivals.reset(jax.random.key(1)), uniforms)[1])()
    assert gaps.min() > 0 and gaps.mean() == pytest.approx(0.5, rel=0.03)
    assert phases.min() >= 0 and 9.9 < phases.max() <= 10


def test_piecewise_vmaps_over_rates_and_starts_in_a_silent_piece():
    arrivals = PiecewiseArrivals(jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [0.0, 100.0]]))
    key = jax.random.key(0)

    def first_gap(arrivals):
        return arrivals.next(jnp.array([0.5]), arrivals.reset(key))[1]

    np.testing.assert_allclose(jax.jit(jax.vmap(first_gap))(arrivals), 1 + math.log(2) * np.array([1, 0.01]), rtol=1e-5)


# Traces


def test_trace_replays_exactly_and_loops_with_the_mean_gap():
    gaps, _ = stream(trace(), 0, 12)
    np.testing.assert_array_equal(gaps, np.array([0, 0.5, 0.25, 2.25, 1, 1, 0.5, 0.25, 2.25, 1, 1, 0.5], np.float32))


def test_trace_rate_scale_and_start_offset():
    np.testing.assert_allclose(stream(trace(rate_scale=2.0), 0, 5)[0], np.array([0, 0.5, 0.25, 2.25, 1]) / 2)
    np.testing.assert_allclose(stream(trace(start=0.6), 0, 4)[0], [0.15, 2.25, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(stream(trace(start=0.5, rate_scale=0.5), 0, 3)[0], [0, 0.5, 4.5], atol=1e-6)
    np.testing.assert_allclose(stream(trace(start=4.0), 0, 3)[0], [0, 1, 0.5])


def test_trace_random_start_draws_every_row_from_the_key():
    workload = trace(start=None)
    states = jax.jit(jax.vmap(workload.reset))(jax.random.split(jax.random.key(0), 200))
    assert set(np.asarray(states.cursor)) == set(range(len(TIMES)))
    _, gaps, _ = jax.jit(jax.vmap(workload.sample))(jax.random.split(jax.random.key(1), 200), states)
    assert not gaps.any()  # an episode begins at its first arrival


def test_trace_lengths_come_from_the_row_that_arrives():
    prompts, outputs = np.array([10, 20, 30, 40, 50]), np.array([100, 1, 300, 5000, 7])
    workload = Workload.create(TraceArrivals.create(TIMES, start=0.5), TraceRequests.create(prompts, outputs, MEANS))
    _, request = stream(workload, 0, 5000)
    rows = (1 + np.arange(5000)) % 5
    np.testing.assert_array_equal(request.prompt_tokens, prompts[rows])
    np.testing.assert_array_equal(request.output_tokens, np.repeat(outputs[rows, None], 3, 1))
    assert request.predicted_output_tokens.min() >= 1
    long = rows == 3
    error = np.log(request.predicted_output_tokens[long] / 5000)
    assert error.std() == pytest.approx(0.15, rel=0.05) and abs(error.mean()) < 0.01
    np.testing.assert_allclose(request.score.mean(0), MEANS, atol=0.006)
    np.testing.assert_allclose((request.score - request.predicted_score).std(0), math.hypot(0.04, 0.028), rtol=0.05)


# Tables


def table(rows: int = 7) -> RequestTable:
    index = np.arange(rows)
    output = index[:, None] * 10 + np.array([1, 2])
    return RequestTable(index + 1, output, output / 100, output + 3, output / 100 + 0.01, False, False)


def test_table_rows_stay_together_and_are_uniform():
    workload = Workload.create(PoissonArrivals.create(1.0), TableRequests.create(table()))
    assert workload.num_experts == 2
    _, request = stream(workload, 0, 7000)
    row = request.prompt_tokens - 1
    np.testing.assert_array_equal(request.output_tokens, row[:, None] * 10 + np.array([1, 2]))
    np.testing.assert_allclose(request.score, request.output_tokens / 100, rtol=1e-6)
    np.testing.assert_array_equal(request.predicted_output_tokens, request.output_tokens + 3)
    np.testing.assert_allclose(request.predicted_score, request.score + 0.01, rtol=1e-5)
    counts = np.bincount(row, minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi square with 6 degrees of freedom, 0.1 %


def test_predictions_with_the_frozen_errors():
    output, score = np.full((100_000,), 500), np.full((100_000,), 0.6)
    predicted_output, predicted_score = predict_with_frozen_errors(np.random.default_rng(0), output, score)
    assert predicted_output.dtype == np.int32
    assert np.log(predicted_output / 500).std() == pytest.approx(0.15, rel=0.02)
    assert (predicted_score - 0.6).std() == pytest.approx(math.hypot(0.04, 0.028), rel=0.02)
    assert predict_with_frozen_errors(np.random.default_rng(0), np.ones(100, int), score[:100])[0].min() == 1


# Bad settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PoissonArrivals.create(0.0), "rate.*above 0"),
        (lambda: PoissonArrivals.create(math.nan), "rate.*above 0"),
        (lambda: trace(rate_scale=-1.0), "rate scale.*above 0"),
        (lambda: trace(start=4.5), "start must lie.*4.0 s.*4.5"),
        (lambda: trace(start=-1.0), "start must"),
        (lambda: TraceArrivals.create(np.zeros(0)), "at least two"),
        (lambda: TraceArrivals.create(np.zeros(3)), "at least two different"),
        (lambda: TraceArrivals.create(np.array([0.0, 2.0, 1.0])), "ascending"),
        (lambda: PiecewiseArrivals.create([1.0], [1.0, 2.0]), "as many durations as rates"),
        (lambda: PiecewiseArrivals.create([], []), "as many durations"),
        (lambda: PiecewiseArrivals.create([1.0, 0.0], [1.0, 2.0]), "durations.*above 0"),
        (lambda: PiecewiseArrivals.create([1.0, 1.0], [1.0, -2.0]), "0 or more"),
        (lambda: PiecewiseArrivals.create([1.0, 1.0], [0.0, 0.0]), "not all 0"),
        (lambda: FrozenRequests.create([0.5, 1.5]), "mean scores"),
        (lambda: FrozenRequests.create([]), "mean scores"),
        (
            lambda: Workload.create(PoissonArrivals.create(1.0), TraceRequests.create(TIMES, TIMES, MEANS)),
            "same trace's arrivals",
        ),
    ],
)
def test_bad_settings_are_one_line(build: Callable[[], object], message: str):
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_true_lengths_in_place_of_predictions():
    workload = Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create(MEANS), true_lengths=True)
    plain = Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create(MEANS))
    key = jax.random.key(0)
    (_, gap, request), (_, other_gap, other) = (w.sample(key, w.reset(key)) for w in (workload, plain))
    assert gap == other_gap
    np.testing.assert_array_equal(request.predicted_output_tokens, request.output_tokens)
    assert (other.predicted_output_tokens != other.output_tokens).any()
    np.testing.assert_array_equal(request.predicted_score, other.predicted_score)
