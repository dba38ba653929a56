"""Arrivals of requests: a Poisson process, one with bursts, a recorded trace, or piecewise constant rates.

Each class has the same three members, which `Workload` calls:

- `draws`: the number of uniforms per arrival;
- `reset(key) -> WorkloadState`: the state before the first arrival;
- `next(uniforms [draws], state) -> (state, gap, row)`: seconds from the previous arrival to this one, and the arrival's
  row in the trace (0 without a trace).

Use `create` to build them, which checks its input. Rates are traced leaves, so a sweep can vmap over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxroute.errors import UserError


class WorkloadState(struct.PyTreeNode):
    """State of a workload between two arrivals. All fields are bounded, so float32 remains precise in a long run."""

    cursor: jax.Array  # int32 [], row of the next arrival in the trace, or current piece or regime of the rates; else 0
    phase: jax.Array  # float [], seconds elapsed of the next recorded gap, or in the current piece; else 0
    pool: Any = None  # of requests that share prefixes: what is going on (prefixes.py)


def _state(cursor: ArrayLike, phase: ArrayLike) -> WorkloadState:
    return WorkloadState(cursor=jnp.asarray(cursor, jnp.int32), phase=jnp.asarray(phase, float))


def _positive(value: float, name: str) -> jax.Array:
    if not (np.isfinite(value) and value > 0):
        raise UserError(f"{name} must be a finite number above 0, is {value}")
    return jnp.asarray(value, float)


class PoissonArrivals(struct.PyTreeNode):
    """Exponential gaps with mean 1 / rate."""

    rate: jax.Array  # float [], requests per second, traced

    @classmethod
    def create(cls, rate: float) -> PoissonArrivals:
        """From the rate in requests per second. Raises `UserError` unless it is above 0."""
        return cls(rate=_positive(rate, "the arrival rate (requests per second)"))

    @property
    def draws(self) -> int:
        """One uniform: the gap."""
        return 1

    def reset(self, key: jax.Array) -> WorkloadState:
        """A process without memory has no state."""
        del key
        return _state(0, 0.0)

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, jax.Array]:
        """The state as it was, an exponential gap (float [], s), row 0."""
        return state, -jnp.log(uniforms[0]) / self.rate, jnp.int32(0)


class TraceArrivals(struct.PyTreeNode):
    """The gaps of a recorded trace, in order. After the last row, the trace begins again.

    `gaps[i]` is the time from row i - 1 to row i. `gaps[0]` is the time from the last row to the first one when the
    trace loops; it is the mean gap of the trace. An episode that starts at the first row has no gap before it.
    """

    gaps: jax.Array  # float [T], recorded seconds, traced
    rate_scale: jax.Array  # float [], traced; 2 replays the trace at twice its rate (gaps halved)
    start_row: jax.Array  # int32 [], traced: the first arrival of an episode
    start_phase: jax.Array  # float [], traced: recorded seconds of that arrival's gap that lie before the start
    random_start: bool = struct.field(pytree_node=False)  # static: each episode starts at a random row

    @classmethod
    def create(cls, times: np.ndarray, rate_scale: float = 1.0, start: float | None = 0.0) -> TraceArrivals:
        """Arrivals at `times` (float64 [T] seconds, sorted, T >= 2).

        `start`: every episode begins this many recorded seconds after the first row. None: every episode begins at the
        arrival of a row that is drawn uniformly from its key.
        """
        seconds = np.asarray(times, np.float64) - times[0] if len(times) else np.zeros(0)
        if len(seconds) < 2 or not seconds[-1] > 0:
            raise UserError("a trace needs at least two different arrival times to be replayed; record a longer one")
        gaps = np.diff(seconds)
        if not (gaps >= 0).all():
            raise UserError("the arrival times of a trace must be numbers in ascending order; sort the trace by time")
        if start is not None and not 0 <= start <= seconds[-1]:
            raise UserError(f"start must lie within the trace's 0 to {seconds[-1]:.1f} s, is {start}")
        gaps = np.concatenate([[seconds[-1] / len(gaps)], gaps])
        row = int(np.searchsorted(seconds, start or 0.0))
        # `start` is within the gap before `row`. At the first row, no part of the gap is left.
        phase = gaps[0] if row == 0 else (start or 0.0) - seconds[row - 1]
        return cls(
            gaps=jnp.asarray(gaps, float),
            rate_scale=_positive(rate_scale, "the trace's rate scale"),
            start_row=jnp.asarray(row, jnp.int32),
            start_phase=jnp.asarray(phase, float),
            random_start=start is None,
        )

    @property
    def draws(self) -> int:
        """None: a trace is what it is."""
        return 0

    def reset(self, key: jax.Array) -> WorkloadState:
        """At `start_row`, or with `random_start` at any row, all alike."""
        if not self.random_start:
            return _state(self.start_row, self.start_phase)
        row = jax.random.randint(key, (), 0, self.gaps.shape[0], jnp.int32)
        return _state(row, self.gaps[row])

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, jax.Array]:
        """The state at the following row, what is left of this row's gap (float [], s), this row (int32 [])."""
        del uniforms
        row = state.cursor
        gap = (self.gaps[row] - state.phase) / self.rate_scale
        following = jnp.where(row + 1 == self.gaps.shape[0], 0, row + 1)
        return _state(following, 0.0), gap, row


class PiecewiseArrivals(struct.PyTreeNode):
    """A Poisson process whose rate is constant on each of K pieces and repeats after the last one.

    The gaps are exact: a gap ends when the cumulative hazard (the integral of the rate over time) has increased by an
    exponential variate with mean 1. The state has the piece and the seconds within it, never an absolute time.
    """

    durations: jax.Array  # float [K], seconds, all above 0, traced
    rates: jax.Array  # float [K], requests per second, traced; 0 is allowed, but not everywhere

    @classmethod
    def create(cls, durations: Sequence[float] | np.ndarray, rates: Sequence[float] | np.ndarray) -> PiecewiseArrivals:
        """From the seconds and the rate (requests per second) of each piece. Raises `UserError`."""
        lengths, levels = np.asarray(durations, np.float64), np.asarray(rates, np.float64)
        if lengths.ndim != 1 or lengths.shape != levels.shape or not len(lengths):
            raise UserError(f"piecewise rates need as many durations as rates: got {lengths.size} and {levels.size}")
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise UserError(f"the durations of piecewise rates must be finite numbers above 0, are {lengths.tolist()}")
        if not (np.isfinite(levels).all() and (levels >= 0).all() and levels.any()):
            raise UserError(f"piecewise rates must be finite, 0 or more, and not all 0, are {levels.tolist()}")
        return cls(durations=jnp.asarray(lengths, float), rates=jnp.asarray(levels, float))

    @property
    def draws(self) -> int:
        """One uniform: the growth of the cumulative hazard."""
        return 1

    def reset(self, key: jax.Array) -> WorkloadState:
        """At the beginning of the first piece."""
        del key
        return _state(0, 0.0)

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, jax.Array]:
        """The state in the piece of the arrival, the gap to it (float [], s), row 0."""
        pieces = self.rates.shape[0]
        hazard = -jnp.log(uniforms[0])
        rate = self.rates[state.cursor]
        left = jnp.maximum(self.durations[state.cursor] - state.phase, 0.0)
        within = hazard < left * rate
        here = hazard / jnp.where(within, rate, 1.0)  # seconds from now, if the arrival falls into the current piece

        # Otherwise the gap consists of the rest of this piece, whole periods, and the following pieces (the current one
        # last) up to the first piece in which the remaining hazard is used up.
        order = (state.cursor + 1 + jnp.arange(pieces, dtype=jnp.int32)) % pieces
        durations, rates = self.durations[order], self.rates[order]
        ends = jnp.cumsum(durations * rates)
        rest = jnp.maximum(hazard - left * rate, 0.0)
        periods = jnp.floor(rest / ends[-1])
        # Rounding must not exceed the last end, so that the piece exists and has a rate above 0.
        rest = jnp.clip(rest - periods * ends[-1], 0.0, ends[-1] * (1 - jnp.finfo(ends.dtype).eps))
        found = jnp.sum(ends <= rest)
        starts = jnp.cumsum(durations) - durations
        into = jnp.clip((rest - (ends[found] - durations[found] * rates[found])) / rates[found], 0.0, durations[found])
        beyond = left + periods * jnp.sum(durations) + starts[found] + into

        following = WorkloadState(
            cursor=jnp.where(within, state.cursor, order[found]).astype(jnp.int32),
            phase=jnp.where(within, state.phase + here, into),
        )
        return following, jnp.where(within, here, beyond), jnp.int32(0)


class MarkovArrivals(struct.PyTreeNode):
    """Bursts: a Poisson process whose rate jumps between two regimes at random times (a two-state Markov-modulated
    Poisson process; Fischer and Meier-Hellstern, <https://doi.org/10.1016/0166-5316(93)90035-S>).

    The gaps are exact and use two uniforms. Let D be the generator of the regimes with the rates subtracted from its
    diagonal. exp(D t) has the probabilities that no request arrived within t seconds and that the process is then in
    each regime. The gap is the time at which their sum has decreased to the first uniform. The second uniform chooses
    the regime, in proportion to its probability times its rate. An episode begins at a random time, so the
    probabilities of its first regime are proportional to the durations.
    """

    rates: jax.Array  # float [2], requests per second in each regime, traced; one may be 0
    durations: jax.Array  # float [2], mean duration of each regime in seconds, above 0, traced

    @classmethod
    def create(cls, rates: Sequence[float] | np.ndarray, durations: Sequence[float] | np.ndarray) -> MarkovArrivals:
        """From the rate (requests per second) and the mean seconds of each regime. Raises `UserError`."""
        levels, lengths = np.asarray(rates, np.float64), np.asarray(durations, np.float64)
        if levels.shape != (2,) or not (np.isfinite(levels).all() and (levels >= 0).all() and levels.any()):
            raise UserError(f"bursts need two rates of 0 or more, not both 0, are {levels.tolist()}")
        if lengths.shape != (2,) or not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise UserError(f"bursts need two mean durations above 0, in seconds, are {lengths.tolist()}")
        return cls(rates=jnp.asarray(levels, float), durations=jnp.asarray(lengths, float))

    @property
    def draws(self) -> int:
        """Two uniforms: the gap, and the regime after it."""
        return 2

    def reset(self, key: jax.Array) -> WorkloadState:
        """In a regime drawn by the share of time that each lasts."""
        return _state(jax.random.uniform(key) * jnp.sum(self.durations) >= self.durations[0], 0.0)

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, jax.Array]:
        """The state in the regime after the arrival, the gap to it (float [], s), row 0."""
        own, other = state.cursor, 1 - state.cursor
        rates, leaving = self.rates, 1 / self.durations
        # -D has the eigenvalues slow < fast with half distance d; the formula of slow avoids cancellation.
        ends = rates + leaving
        middle, half = (ends[own] + ends[other]) / 2, (ends[other] - ends[own]) / 2
        d = jnp.sqrt(half * half + leaving[0] * leaving[1])
        slow = (rates[0] * rates[1] + rates[0] * leaving[1] + rates[1] * leaving[0]) / (middle + d)

        def remaining(time: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Probabilities of no request and of the same and the other regime, each divided by exp(-slow * time)."""
            decayed = jnp.exp(-2 * d * time)
            rise = (1 - decayed) / (2 * d)
            return (1 + decayed) / 2 + half * rise, leaving[own] * rise

        hazard = -jnp.log(uniforms[0])
        # The sum of the two is monotone in time, from 1 to this limit, which bounds the gap on both sides.
        last = jnp.log((1 + (half + leaving[own]) / d) / 2)
        low, high = (jnp.maximum(hazard + shift, 0) / slow for shift in (jnp.minimum(last, 0), jnp.maximum(last, 0)))

        def bisect(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            time = (low + high) / 2
            before = slow * time - jnp.log(jnp.add(*remaining(time))) < hazard
            return jnp.where(before, time, low), jnp.where(before, high, time)

        gap = jnp.add(*jax.lax.fori_loop(0, 40, bisect, (low, high))) / 2
        stays, changed = remaining(gap)
        stays, changed = stays * rates[own], changed * rates[other]
        regime = jnp.where(uniforms[1] * (stays + changed) < changed, other, own)
        return WorkloadState(cursor=regime.astype(jnp.int32), phase=state.phase), gap, jnp.int32(0)


Arrivals = PoissonArrivals | TraceArrivals | PiecewiseArrivals | MarkovArrivals
