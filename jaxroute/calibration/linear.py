"""Linear functions of the errors in the parameters, fitted to candidates around a point, and their information."""

from typing import NamedTuple

import numpy as np


class Linear(NamedTuple):
    """Errors of R requests in 3 metrics; nan if the log has no such latency."""

    at_centre: np.ndarray  # [R, 3]
    slopes: np.ndarray  # [R, 3, P]
    variance: np.ndarray  # [R, 3, P], of the slopes


def linear(steps: np.ndarray, errors: np.ndarray) -> Linear:
    """Least squares over N candidates at `steps` [N, P] from the centre, with `errors` [N, R, 3].

    This averages over the discontinuities of a schedule when parameters change.
    """
    count, parameters = steps.shape
    design = np.concatenate([np.ones((count, 1)), steps], axis=1)
    flat = np.nan_to_num(errors.reshape(count, -1))
    solution, *_ = np.linalg.lstsq(design, flat, rcond=None)
    spread = ((flat - design @ solution) ** 2).sum(0) / max(count - parameters - 1, 1)
    inverse = np.diag(np.linalg.pinv(design.T @ design))[1:]
    shape = errors.shape[1:]
    return Linear(
        np.where(np.isnan(errors[0]), np.nan, solution[0].reshape(shape)),
        np.moveaxis(solution[1:].reshape(parameters, *shape), 0, -1),
        spread.reshape(*shape, 1) * inverse,
    )


PRIOR = 0.5
"""Standard deviation, on its scale, of a parameter without information: a factor of 2.7."""

_LINEAR_FROM = 2.0  # standard deviations above which an error counts linearly


class Information(NamedTuple):
    """Least squares of the linear functions for P parameters, with each error relative to the spread of its metric."""

    known: np.ndarray  # [P], information along each direction; 0 if below the noise of the slopes
    directions: np.ndarray  # [P, P], columns
    gradients: np.ndarray  # [R, P], gradients of each request's share of half the sum of squares

    def solve(self, gradient: np.ndarray) -> np.ndarray:
        """The step [..., P] for a gradient [..., P], along the directions with information."""
        along = np.where(self.known > 0, 1 / (self.known + PRIOR**-2), 0)
        return -(gradient @ self.directions * along) @ self.directions.T

    @property
    def deviations(self) -> np.ndarray:
        """Standard deviations of the parameters, [P]; along directions without information `PRIOR`."""
        return np.sqrt((self.directions**2 / (self.known + PRIOR**-2)).sum(axis=1))


def information(found: Linear) -> Information:
    """What the errors say of the parameters.

    An error far outside of its metric's spread counts linearly, not by its square.
    """
    there = ~np.isnan(found.at_centre)
    scale = np.asarray([1.48 * np.median(np.abs(metric[own])) if own.any() else 1.0 for metric, own in _columns(found)])
    scale = np.maximum(scale, 1e-4)
    at_centre = np.nan_to_num(found.at_centre) / scale
    slopes, variance = found.slopes / scale[:, None], found.variance / scale[:, None] ** 2
    each = there / np.sqrt(1 + (at_centre / _LINEAR_FROM) ** 2)
    squares = np.einsum("rmp,rm,rmq->pq", slopes, each, slopes)
    noise = np.einsum("rmp,rm->p", variance, each)  # the part of the squares that is not information
    values, directions = np.linalg.eigh(squares - np.diag(noise))
    gradients = np.einsum("rmp,rm,rm->rp", slopes, each, at_centre)
    return Information(np.where(values > noise.mean(), values, 0), directions, gradients)


def _columns(found: Linear) -> list[tuple[np.ndarray, np.ndarray]]:
    """The errors of each metric, and which of them exist."""
    return [(metric, ~np.isnan(metric)) for metric in found.at_centre.T]
