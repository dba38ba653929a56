"""Markov-modulated arrivals against a plain simulation of their regimes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workload import MarkovArrivals

COUNT = 60_000
CASES = [((1.0, 9.0), (8.0, 2.0)), ((0.0, 5.0), (3.0, 1.0)), ((4.0, 4.0), (1.0, 2.0)), ((6.0, 0.5), (0.1, 0.3))]


@pytest.fixture(scope="module")
def streams():
    """Gaps and regimes at arrivals [cases, COUNT], by one program."""
    arrivals = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(MarkovArrivals.create(*case) for case in CASES))

    def stream(arrivals, key):
        def step(state, uniforms):
            state, gap, _ = arrivals.next(uniforms, state)
            return state, (gap, state.cursor)

        return jax.lax.scan(step, arrivals.reset(key), jax.random.uniform(key, (COUNT, 2), minval=1e-7))[1]

    return jax.device_get(jax.jit(jax.vmap(stream))(arrivals, jax.random.split(jax.random.key(3), len(CASES))))


def brute_force(rates, durations, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same event by event: in a regime, whichever comes first of a request and its end."""
    rng = np.random.default_rng(seed)
    gaps, regimes, regime, waited = [], [], 0, 0.0
    while len(gaps) < COUNT:
        total = rates[regime] + 1 / durations[regime]
        waited += rng.exponential(1 / total)
        if rng.random() * total < rates[regime]:
            gaps.append(waited)
            regimes.append(regime)
            waited = 0.0
        else:
            regime = 1 - regime
    return np.array(gaps), np.array(regimes)


def correlation(gaps: np.ndarray, lag: int) -> float:
    return float(np.corrcoef(gaps[:-lag], gaps[lag:])[0, 1])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bursts_are_those_of_a_plain_simulation(streams, case):
    gaps, regimes = streams[0][case].astype(np.float64), streams[1][case]
    wanted, wanted_regimes = brute_force(*CASES[case], seed=case)
    rates, durations = np.array(CASES[case])
    assert gaps.min() >= 0 and np.isfinite(gaps).all()
    mean_rate = rates @ durations / durations.sum()
    for found in (gaps, wanted):  # the oracle too is held to what is known
        assert 1 / found.mean() == pytest.approx(mean_rate, rel=0.06)
    # Two samples' Kolmogorov-Smirnov distance; bursts make neighbours alike, so the bound is wider than for 1 %.
    ends = np.sort(np.concatenate([gaps, wanted]))
    parts = [np.searchsorted(np.sort(found), ends, side="right") / COUNT for found in (gaps, wanted)]
    assert np.abs(parts[0] - parts[1]).max() < 0.02
    assert regimes.mean() == pytest.approx(wanted_regimes.mean(), abs=0.02)
    assert (regimes[1:] != regimes[:-1]).mean() == pytest.approx(
        (wanted_regimes[1:] != wanted_regimes[:-1]).mean(), abs=0.01
    )
    for lag in (1, 3):
        assert correlation(gaps, lag) == pytest.approx(correlation(wanted, lag), abs=0.03)
    # Requests in windows of 5 s: their variance over their mean is 1 without bursts.
    index = [np.var(count) / np.mean(count) for count in map(_counts, (gaps, wanted))]
    assert index[0] == pytest.approx(index[1], rel=0.15)


def _counts(gaps: np.ndarray) -> np.ndarray:
    return np.bincount((np.cumsum(gaps) / 5).astype(int))


def test_an_episode_begins_at_a_random_time():
    arrivals = MarkovArrivals.create((1.0, 9.0), (8.0, 2.0))
    states = jax.vmap(arrivals.reset)(jax.random.split(jax.random.key(0), 4000))
    assert np.mean(states.cursor) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("rates", "durations", "word"),
    [((1.0,), (1.0, 1.0), "two rates"), ((0.0, 0.0), (1.0, 1.0), "not both 0"), ((1.0, 2.0), (1.0, 0.0), "above 0")],
)
def test_bad_numbers_are_one_clear_line(rates, durations, word):
    with pytest.raises(UserError, match=word):
        MarkovArrivals.create(rates, durations)
