"""Means over episodes and their 95 % confidence intervals."""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The interval from mean - half_width to mean + half_width contains the true mean with probability `CONFIDENCE`."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width


def mean_interval(values: np.ndarray) -> Interval:
    """Student's t interval of the mean of independent `values` [E], E >= 2."""
    values = np.asarray(values, np.float64)
    quantile = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)
    return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values))))


def paired_difference(values: np.ndarray, others: np.ndarray) -> Interval:
    """Interval of the mean of `values - others`, both [E], where episode e of both had the same requests.

    The pairing removes the common effect of the requests, so the interval is narrower than without it.
    """
    return mean_interval(np.asarray(values, np.float64) - np.asarray(others, np.float64))
