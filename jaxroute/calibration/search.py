"""Searches for the candidate whose simulation of the whole log is closest to the measured times."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxroute.calibration.candidates import LogRequests, simulate
from jaxroute.calibration.linear import information, linear
from jaxroute.calibration.logs import ServerLog
from jaxroute.calibration.space import OVERHEAD, Space, peak_running, servers_at
from jaxroute.cma_es import ALL, EACH, Search, devices_for, over_devices
from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineParams

METRICS = ("ttft", "tpot", "e2e")
ROBUST_FROM = 0.05
"""Relative error above which a residual counts linearly."""

_WORST = 10.0  # relative error of a request that did not finish
_AROUND = 192  # number of candidates around a point
_WIDTHS = (0.2, 0.15, 0.1)  # standard deviations of their parameters per step; the last one is repeated
_MET = 0.7  # share of the loss of the smooth best below which a candidate's loss is not chance
_PRIOR = 1e-5  # factor of the squared distance from the start: fixes what the log does not determine


@partial(jax.jit, static_argnames=("names", "slots", "engines", "devices"))
def _first_and_last(
    values: jax.Array,
    engine: EngineParams,
    requests: LogRequests,
    latest: jax.Array,
    rounds: jax.Array,
    names: tuple[str, ...],
    slots: int,
    engines: int,
    devices: int,
) -> tuple[jax.Array, ...]:
    """Times [R, K] of candidates with the parameters `values` [K, P]; bool [K], overflowed.

    Each device simulates an equal part of them.
    """

    def run(values: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
        engine, requests, latest, rounds = rest
        out = simulate(servers_at(names, values, engine), requests, latest, rounds, slots, engines)
        return out.first_token, out.finish, out.overflowed

    last = PartitionSpec(None, *EACH)
    run = over_devices(run, devices, inputs=(EACH, ALL, ALL, ALL, ALL), outputs=(last, last, EACH))
    return run(values, engine, requests, latest, rounds)


class Simulator:
    """Computes relative errors of candidates. `lanes` candidates are simulated at once, divided among the devices."""

    def __init__(self, space: Space, log: ServerLog, lanes: int):
        self.space, self.log, self.lanes = space, log, lanes
        self.evaluated = 0
        self._devices = devices_for(lanes)
        guess = 1.1 * peak_running(log) / space.num_engines + 8
        self._slots = min(len(log), 16 * int(np.ceil(guess / 16)))
        shared = np.zeros(len(log)) if log.shared_tokens is None else log.shared_tokens
        self._requests = LogRequests(
            jnp.asarray(log.arrival, float),
            jnp.asarray(log.prompt_tokens, jnp.int32),
            jnp.asarray(log.output_tokens, jnp.int32),
            jnp.asarray(shared, jnp.int32),
        )
        # A candidate that is much slower, or mostly preempts, is not simulated to its end.
        self._latest = jnp.asarray(1.5 * log.finish.max() + 10, float)
        self._rounds = jnp.int32(40 * len(log) + 1000)

    def _run(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times [K, R] of `lanes` points; if many of them need more slots, later calls use more."""
        space, most = self.space, len(self.log)
        values = np.asarray([list(space.values(point).values()) for point in points])
        while True:
            first, last, overflowed = _first_and_last(
                jnp.asarray(values, float),
                space.engine,
                self._requests,
                self._latest,
                self._rounds,
                tuple(space.names),
                self._slots,
                space.num_engines,
                self._devices,
            )
            overflowed = np.asarray(overflowed)
            if overflowed.mean() <= 0.25 or self._slots >= most:
                break
            self._slots = min(most, 2 * self._slots)
        first, last = np.array(first, np.float64).T, np.array(last, np.float64).T
        first[overflowed], last[overflowed] = np.inf, np.inf
        return first, last

    def times(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last token of every request, s, float64 [K, R] each, inf if there is none; `points` [K, P]."""
        parts = []
        for begin in range(0, len(points), self.lanes):
            part = points[begin : begin + self.lanes]
            padded = np.concatenate([part, np.repeat(part[-1:], self.lanes - len(part), axis=0)])
            parts.append([times[: len(part)] for times in self._run(padded)])
            self.evaluated += len(part)
        overhead = np.asarray([[self.space.values(point)[OVERHEAD]] for point in points])
        first, last = (np.concatenate(times) + overhead for times in zip(*parts, strict=True))
        return first, last

    def errors(self, points: np.ndarray) -> np.ndarray:
        """Relative errors, float64 [K, R, 3] in the order of `METRICS`; nan if the log has no such latency."""
        return relative_errors(self.log, *self.times(points))


def relative_errors(log: ServerLog, first_token: np.ndarray, finish: np.ndarray) -> np.ndarray:
    """(simulated - measured) / measured, [..., R, 3], of times [..., R].

    The error of a TTFT is relative to the measured TTFT plus one iteration, since a request may arrive at another
    moment of an iteration than in the simulation.
    """
    measured = log.measured
    floor = np.nanmedian(measured["tpot"]) if np.isfinite(measured["tpot"]).any() else 0.0
    with np.errstate(invalid="ignore"):
        simulated = log.latencies(first_token, finish)
        errors = [
            (simulated[name] - measured[name]) / np.maximum(measured[name] + (floor if name == "ttft" else 0.0), 1e-6)
            for name in METRICS
        ]
    stacked = np.clip(
        np.where(np.isfinite(first_token + finish)[..., None], np.stack(errors, -1), _WORST), -_WORST, _WORST
    )
    return np.where(np.isnan(measured["tpot"])[:, None] & (np.asarray(METRICS) == "tpot"), np.nan, stacked)


def robust(errors: np.ndarray) -> np.ndarray:
    """Pseudo-Huber: quadratic up to about `ROBUST_FROM`, then linear."""
    return 2 * ROBUST_FROM**2 * (np.sqrt(1 + (errors / ROBUST_FROM) ** 2) - 1)


def loss(errors: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Mean loss [...] of errors [..., R, 3] over the metrics and the requests `among` (bool [R])."""
    return np.nanmean(robust(errors[..., among, :]), axis=(-1, -2))


class Fit(NamedTuple):
    """The result of a search."""

    point: np.ndarray  # [P], the best point on the scale of the space
    loss: float
    free: np.ndarray  # bool [P], False for parameters that the data do not need
    complete: bool  # whether the search ended before the deadline


def search(
    simulator: Simulator,
    among: np.ndarray,
    seed: int,
    deadline: float,
    report: Callable[[int, int, float], None],
    generations: int = 30,
    refinements: int = 6,
) -> Fit:
    """The best point for the requests `among`, found before `deadline` (`time.monotonic`).

    The search is `cma_es.Search` around the best of a generation over the whole space, followed by `_refined`. `report`
    receives the number of generations, their maximum, and the loss.
    """
    space, (low, high) = simulator.space, simulator.space.bounds
    start, spread = space.start, space.spread

    def judged(points: np.ndarray) -> np.ndarray:
        inside = np.clip(points, low, high)
        outside = np.sum((points - inside) ** 2, axis=1)
        values = loss(simulator.errors(inside), among)
        return values + _PRIOR * np.sum((inside - start) ** 2, axis=1) + outside

    random = np.random.default_rng(seed)
    wide = start + 1.5 * spread * random.standard_normal((simulator.lanes, len(start)))
    wide[0] = start
    wide = np.clip(wide, low, high)
    values = judged(wide)
    best, best_loss = wide[values.argmin()], float(values.min())
    if best_loss >= 0.9 * float(robust(np.asarray(_WORST))):
        raise UserError(
            "no candidate finishes the log in 1.5 times its duration; check that the engine's options are right"
        )
    strategy, history = Search(best, 0.5 * spread, simulator.lanes, seed), [best_loss]
    for generation in range(1, generations + 1):
        if time.monotonic() > deadline:
            break
        points = strategy.ask()
        values = judged(points)
        strategy.tell(values)
        if values.min() < best_loss:
            best, best_loss = np.clip(points[values.argmin()], low, high), float(values.min())
        history.append(best_loss)
        report(generation, generations + refinements, best_loss)
        if generation > 15 and history[-10] - best_loss < 1e-2 * best_loss:
            break

    centre, at_centre = best, np.inf
    for refinement in range(refinements):
        if time.monotonic() > deadline:
            break
        centre = _refined(simulator, centre, among, random, _WIDTHS[min(refinement, len(_WIDTHS) - 1)])
        at_centre = float(judged(centre[None])[0])
        report(generations + refinement + 1, generations + refinements, at_centre)
    # A candidate that is much better than the smooth best reproduces the exact schedule of the log.
    if best_loss > _MET * at_centre:
        best, best_loss = centre, at_centre
    # An overhead is kept only if it reduces the loss by 3 %.
    free = np.ones(len(best), bool)
    overhead = space.names.index(OVERHEAD)
    without = best.copy()
    without[overhead] = low[overhead]
    at_none = float(judged(without[None])[0])
    if at_none < 1.03 * best_loss:
        best, best_loss, free[overhead] = without, at_none, False
    return Fit(best, best_loss, free, time.monotonic() <= deadline)


def _refined(
    simulator: Simulator, centre: np.ndarray, among: np.ndarray, random: np.random.Generator, width: float
) -> np.ndarray:
    """One Gauss-Newton step on linear functions that are fitted to candidates around `centre`.

    The loss of a single candidate depends on the moments of an iteration at which requests arrive, which change with
    every small change of a parameter. The linear functions average over these moments and use each request's error.
    """
    low, high = simulator.space.bounds
    count = simulator.lanes * -(-_AROUND // simulator.lanes)
    points = np.clip(centre + width * random.standard_normal((count, len(centre))), low, high)
    errors = np.clip(simulator.errors(points), -1, 1)[:, among]
    # The worst quarter is left out, with most candidates that do not finish.
    near = np.argsort(np.nanmean(robust(errors), axis=(1, 2)))[: 3 * count // 4]
    known = information(linear(points[near] - centre, errors[near]))
    step = known.solve(known.gradients.sum(0))
    return np.clip(centre + np.clip(step, -3 * width, 3 * width), low, high)
