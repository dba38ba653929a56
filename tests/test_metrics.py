"""Recording and summarising the timings of requests; test_environment has the whole path against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.environment.metrics import TIMINGS, empty_totals, record_timings, summarize

EXPERTS, SLOTS, ROUNDS = 3, 16, 125
EPISODE = EXPERTS * SLOTS * ROUNDS


def _timings(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(timings [ROUNDS, 3, N, S], present, index [ROUNDS, N, S]): one request a slot and round, some of them absent."""
    rng = np.random.default_rng(seed)
    shape = (ROUNDS, 3, EXPERTS, SLOTS)
    middle = np.asarray([0.03, 0.4, 0.02])[:, None, None]
    timings = (middle * np.exp(rng.normal(0, 0.8, shape))).astype(np.float32)
    finished, several = rng.random((2, ROUNDS, EXPERTS, SLOTS)) < 0.9
    present = np.stack([finished, finished, finished & several], axis=1)
    index = rng.permutation(EPISODE).reshape(ROUNDS, EXPERTS, SLOTS).astype(np.int32)
    return timings, present, index


def _totals(level: str, timings: np.ndarray, present: np.ndarray, index: np.ndarray):
    """Totals that hold these timings and are otherwise empty."""
    empty = empty_totals(EXPERTS, level, EPISODE)

    def add(histogram, inputs):
        return record_timings(histogram, level, *inputs), None

    histogram, _ = jax.jit(lambda *inputs: jax.lax.scan(add, empty.histogram, inputs))(timings, present, index)
    return empty.replace(
        histogram=histogram,
        completed=jnp.asarray(present[:, 0].sum(axis=(0, 2)), float),
        several_tokens=jnp.asarray(present[:, 2].sum(axis=(0, 2)), float),
        timings=jnp.asarray(np.where(present, timings, 0).sum(axis=(0, 3)), float),
    )


def test_percentiles_of_both_levels():
    timings, present, index = _timings(0)
    by_histogram = summarize(_totals("histogram", timings, present, index), "histogram")
    exactly = summarize(_totals("exact", timings, present, index), "exact")
    for row, name in enumerate(TIMINGS):
        values = timings[:, row][present[:, row]]
        np.testing.assert_allclose(exactly[name], values.mean(), rtol=1e-5)
        np.testing.assert_allclose(by_histogram[name], values.mean(), rtol=1e-5)
        for quantile in (50, 95, 99):
            wanted = np.percentile(values, quantile)
            np.testing.assert_allclose(exactly[f"{name}_p{quantile}"], wanted, rtol=1e-5)
            np.testing.assert_allclose(by_histogram[f"{name}_p{quantile}"], wanted, rtol=0.02)


def test_every_request_has_its_own_place():
    timings, present, index = _timings(1)
    recorded = np.asarray(_totals("exact", timings, present, index).histogram)
    for row in range(3):
        wanted = np.full(EPISODE, np.nan, np.float32)
        wanted[index[present[:, row]]] = timings[:, row][present[:, row]]
        np.testing.assert_array_equal(recorded[row], wanted)


def test_totals_of_episodes_add_up():
    one, other = _timings(2), _timings(3)
    both = jax.tree.map(jnp.add, _totals("histogram", *one), _totals("histogram", *other))
    together = _totals("histogram", *(np.concatenate(parts) for parts in zip(one, other, strict=True)))
    np.testing.assert_array_equal(both.histogram, together.histogram)
    assert both.histogram[0].sum() == one[1][:, 0].sum() + other[1][:, 0].sum()


def test_timings_beyond_the_histogram_fall_into_its_ends():
    timings = jnp.asarray([0.0, 1e-5, 1e6]).reshape(1, 1, 3) * jnp.ones((3, 1, 1))
    empty = empty_totals(1, "histogram", 3)
    histogram = record_timings(empty.histogram, "histogram", timings, timings >= 0, jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_array_equal(histogram[:, 0], [2, 2, 2])
    np.testing.assert_array_equal(histogram[:, -1], [1, 1, 1])


@pytest.mark.parametrize("level", ["histogram", "exact"])
def test_what_has_nothing_to_average_is_nan(level):
    totals = empty_totals(2, level, 10).replace(arrived=jnp.float32(4), dropped=jnp.float32(4), elapsed=jnp.float32(2))
    summary = summarize(totals, level)
    assert (summary["qos"], summary["drop_rate"], summary["rejection_rate"], summary["utilization"]) == (0, 1, 0, 0)
    for name in ("score", "violation_rate", "ttft", "latency_per_token_p50", "tpot_p99", "qos_per_busy_second"):
        assert np.isnan(summary[name]), name


def test_no_metrics_no_totals():
    assert empty_totals(3, "off", 100) is None
