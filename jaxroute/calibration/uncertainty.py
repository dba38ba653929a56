"""Bootstrap intervals of the parameters, and which parameters the log does not identify.

Many candidates around the best point are simulated, and each error of each request is fitted by a linear function of
the parameters, which averages over the discontinuities of schedules. Requests are then resampled in blocks of
consecutive ones, because their errors are correlated. One Gauss-Newton step gives the best point of each sample.
"""

from typing import NamedTuple

import numpy as np

from jaxroute.calibration.linear import Information, information, linear
from jaxroute.calibration.search import Fit, Simulator

IDENTIFIED = 0.05
"""A parameter is identified if its 95 % interval extends at most this share of it to either side."""

KNEE_KNOWN = 0.25
"""The slopes below and above the knee are identified only if its interval extends at most this share of it."""

_CAUTION = 1.5  # factor of the intervals: with 1, they covered 88 % of the bases of benchmarks.calibration
_WIDTH = 0.1  # standard deviation of the parameters of candidates around the best point
_AROUND = 384  # number of candidates
_DRAWS = 300


class ParameterInterval(NamedTuple):
    """A 95 % interval of a parameter, in its unit, and whether the log identifies it (`IDENTIFIED`)."""

    low: float
    high: float
    identified: bool


def intervals(simulator: Simulator, fit: Fit, among: np.ndarray, seed: int = 0) -> dict[str, ParameterInterval]:
    """95 % intervals of the estimated parameters, fitted to the requests `among` (bool [R])."""
    space, (low, high) = simulator.space, simulator.space.bounds
    free = np.flatnonzero(fit.free)
    random = np.random.default_rng(seed)
    steps = np.zeros((simulator.lanes * -(-_AROUND // simulator.lanes), len(fit.point)))
    steps[:, free] = _WIDTH * random.standard_normal((len(steps), len(free)))
    points = np.clip(fit.point + steps, low, high)
    errors = simulator.errors(points)[:, among]  # [N, R, 3]
    half = _half_widths(information(linear(points[:, free] - fit.point[free], errors)), random)
    found = {}
    for place, index in enumerate(free):
        parameter, centre = space.parameters[index], fit.point[index]
        # At a bound of the search space, the bound determined the parameter, not the data.
        at_end = min(centre - low[index], high[index] - centre) < 1e-3
        ends = np.maximum(np.exp(centre + half[place] * np.asarray([-1, 1])) - parameter.offset, 0)
        value = np.exp(centre) - parameter.offset
        sure = not at_end and np.abs(ends - value).max() <= IDENTIFIED * value
        ends = np.clip(ends, parameter.low, parameter.high)
        found[parameter.name] = ParameterInterval(float(ends[0]), float(ends[1]), bool(sure))
    knee = found["knee_tokens"]
    if (knee.high - knee.low) / (knee.high + knee.low) > KNEE_KNOWN:
        for name in ("per_prefill_token", "per_token_above_knee"):
            found[name] = found[name]._replace(identified=False)
    return found


def _half_widths(known: Information, random: np.random.Generator) -> np.ndarray:
    """Half-widths [P] of the intervals on the scale of the space: the larger of bootstrap and least-squares formula."""
    requests = len(known.gradients)
    block = max(int(np.sqrt(requests)), 1)
    first = random.integers(requests, size=(_DRAWS, -(-requests // block), 1))
    rows = ((first + np.arange(block)) % requests).reshape(_DRAWS, -1)[:, :requests]
    moved = known.solve(known.gradients[rows].sum(1) - known.gradients.sum(0))
    return _CAUTION * np.maximum(np.quantile(np.abs(moved), 0.95, axis=0), 1.96 * known.deviations)
