"""Recording and summarising completed requests; test_environment has the whole path against the reference."""

from __future__ import annotations

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxroute.environment.metrics import (
    TIMINGS,
    Completed,
    add_completed,
    empty_totals,
    summarize,
    totals_first,
    totals_last,
)
from jaxroute.environment.qos import QosRule
from tests.rollouts import CHEAP_COMPILE

EXPERTS, ROUNDS = 3, 1500
EPISODE = EXPERTS * ROUNDS
LIMIT = 0.03


def _completed(seed: int) -> Completed:
    """At most one request a round and expert, each field [ROUNDS, N]; a third of them of one token only."""
    rng = np.random.default_rng(seed)
    shape = (ROUNDS, EXPERTS)
    served = rng.random(shape) < 0.8
    tokens = np.where(rng.random(shape) < 0.3, 1, rng.integers(2, 200, shape))
    arrival = rng.uniform(-5, 5, shape)
    first_token = arrival + 0.4 * np.exp(rng.normal(0, 0.8, shape))
    finish = first_token + (tokens - 1) * 0.02 * np.exp(rng.normal(0, 0.8, shape))
    field = lambda values, dtype: jnp.asarray(np.where(served, values, 0), dtype)  # noqa: E731
    return Completed(
        served=jnp.asarray(served),
        index=field(rng.permutation(EPISODE).reshape(shape), jnp.int32),
        tokens=jnp.asarray(np.where(served, tokens, 1), jnp.int32),
        score=field(rng.random(shape), float),
        preemptions=field(rng.integers(0, 3, shape), jnp.int32),
        arrival=field(arrival, float),
        first_token=field(first_token, float),
        finish=field(finish, float),
    )


def _totals(level: str, completed: Completed, slots: int = 1):
    """Totals of one environment, whose rounds come as the requests in so many slots at a time."""

    def add(totals, requests):
        return add_completed(totals, level, requests, QosRule(jnp.asarray(LIMIT))), None

    start = totals_last(jax.tree.map(lambda leaf: leaf[None], empty_totals(EXPERTS, level, EPISODE)))
    inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, slots, EXPERTS, 1), completed)
    totals = jax.jit(lambda inputs: jax.lax.scan(add, start, inputs)[0], compiler_options=CHEAP_COMPILE)(inputs)
    return jax.tree.map(lambda leaf: leaf[0], totals_first(totals))


def _timings(completed: Completed) -> list[np.ndarray]:
    """Each of TIMINGS, float64 [ROUNDS, N], NaN where there is none."""
    arrival, first, finish = (np.float64(t) for t in (completed.arrival, completed.first_token, completed.finish))
    tokens, served = np.asarray(completed.tokens), np.asarray(completed.served)
    several = served & (tokens > 1)
    return [
        np.where(served, (finish - arrival) / tokens, np.nan),
        np.where(served, first - arrival, np.nan),
        np.where(several, (finish - first) / np.maximum(tokens - 1, 1), np.nan),
    ]


def test_percentiles_of_both_levels():
    completed = _completed(0)
    by_histogram = summarize(_totals("histogram", completed), "histogram")
    exactly = summarize(_totals("exact", completed), "exact")
    for name, values in zip(TIMINGS, _timings(completed), strict=True):
        for summary in (exactly, by_histogram):
            np.testing.assert_allclose(summary[name], np.nanmean(values), rtol=1e-4)
        for quantile in (50, 95, 99):
            key, wanted = f"{name}_p{quantile}", np.nanpercentile(values, quantile)
            np.testing.assert_allclose(exactly[key], wanted, rtol=1e-4)
            np.testing.assert_allclose(by_histogram[key], wanted, rtol=0.02)


_SUMMARIES = {level: jax.jit(functools.partial(summarize, level=level)) for level in ("exact", "histogram")}
_ADD = {level: jax.jit(functools.partial(add_completed, level=level)) for level in ("exact", "histogram")}
FEW = 7


@hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.lists(st.floats(0.001001, 3400) | st.floats(0.001001, 0.1), min_size=1, max_size=FEW))
def test_a_histogram_is_within_two_percent_for_any_few_requests(ttft):
    """Few requests, far apart, at the edges of bins and of the histogram, equal ones."""
    shape, count = (FEW, 1, 1), len(ttft)
    first = jnp.zeros(FEW, float).at[:count].set(jnp.asarray(ttft, float)).reshape(shape)
    number, zero = jnp.arange(FEW, dtype=jnp.int32).reshape(shape), jnp.zeros(shape, float)
    # Of 2 tokens, the second of which takes as long as the first: TPOT and latency per token are the same numbers.
    completed = Completed(
        served=number < count,
        index=number,
        tokens=jnp.full(shape, 2, jnp.int32),
        score=zero,
        preemptions=number,
        arrival=zero,
        first_token=first,
        finish=2 * first,
    )
    found = {}
    for level in ("exact", "histogram"):
        start = totals_last(jax.tree.map(lambda leaf: leaf[None], empty_totals(1, level, FEW)))
        totals = _ADD[level](start, completed=completed, rule=QosRule(jnp.asarray(LIMIT)))
        found[level] = _SUMMARIES[level](jax.tree.map(lambda leaf: leaf[0], totals_first(totals)))
    for name in TIMINGS:
        for quantile in (50, 95, 99):
            key = f"{name}_p{quantile}"
            np.testing.assert_allclose(found["exact"][key], np.percentile(ttft, quantile), rtol=1e-3)
            np.testing.assert_allclose(found["histogram"][key], found["exact"][key], rtol=0.02)


def test_every_request_is_counted_and_has_its_own_place():
    completed = _completed(1)
    totals = _totals("exact", completed, slots=5)
    served, index, score = (np.asarray(leaf) for leaf in (completed.served, completed.index, completed.score))
    timings = _timings(completed)
    for row, values in zip(np.asarray(totals.timing_record), timings, strict=True):
        wanted = np.full(EPISODE, np.nan)
        wanted[index[served]] = values[served]
        np.testing.assert_allclose(row, wanted, rtol=1e-3, atol=1e-6)  # differences of times of some seconds in float32
    met = served & (timings[0] < LIMIT)
    assert 0 < met.sum() < served.sum()
    np.testing.assert_array_equal(totals.completed, served.sum(axis=0))
    np.testing.assert_array_equal(totals.violations, (served & ~met).sum(axis=0))
    np.testing.assert_array_equal(totals.several_tokens, (~np.isnan(timings[2])).sum(axis=0))
    np.testing.assert_array_equal(totals.preemptions, np.asarray(completed.preemptions).sum(axis=0))
    np.testing.assert_allclose(totals.qos, np.where(met, score, 0).sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(totals.score, score.sum(axis=0), rtol=1e-4)


def test_totals_of_episodes_add_up():
    one, other = _completed(2), _completed(3)
    both = jax.tree.map(jnp.add, _totals("histogram", one), _totals("histogram", other))
    together = _totals("histogram", jax.tree.map(lambda *leaves: jnp.concatenate(leaves), one, other))
    np.testing.assert_array_equal(both.timing_record, together.timing_record)
    np.testing.assert_array_equal(both.completed, together.completed)
    np.testing.assert_allclose(both.timings, together.timings, rtol=1e-4)


def test_timings_beyond_the_histogram_fall_into_its_ends():
    zero, one = jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1), jnp.int32)
    finish = jnp.asarray([0.0, 1e-5, 1e6])[None, :, None]
    request = Completed(one > 0, one, one, zero, one, arrival=zero, first_token=finish, finish=finish)
    totals = totals_last(jax.tree.map(lambda leaf: leaf[None], empty_totals(3, "histogram", 3)))
    histogram = add_completed(totals, "histogram", request, QosRule(jnp.asarray(LIMIT))).timing_record[0]
    np.testing.assert_array_equal(histogram[:, 0], [2, 2, 0])
    np.testing.assert_array_equal(histogram[:, -1], [1, 1, 0])


@pytest.mark.parametrize("level", ["histogram", "exact"])
def test_what_has_nothing_to_average_is_nan(level):
    totals = empty_totals(2, level, 10).replace(arrived=jnp.float32(4), dropped=jnp.float32(4), elapsed=jnp.float32(2))
    summary = summarize(totals, level)
    assert (summary["qos"], summary["drop_rate"], summary["rejection_rate"], summary["utilization"]) == (0, 1, 0, 0)
    for name in ("score", "violation_rate", "ttft", "latency_per_token_p50", "tpot_p99", "qos_per_busy_second"):
        assert np.isnan(summary[name]), name


def test_no_metrics_no_totals():
    assert empty_totals(3, "off", 100) is None
