"""Buckets of values: their bounds, and point predictions from distributions over buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = 10


@dataclass(frozen=True)
class Buckets:
    """Bounds per expert that divide the training values into `BUCKETS` equal shares (fewer if values repeat)."""

    bounds: np.ndarray  # float32 [N, BUCKETS + 1], ascending from the minimum to the maximum
    means: np.ndarray  # float32 [N, BUCKETS], means of the training values; a bound for an empty bucket

    @classmethod
    def fit(cls, values: np.ndarray) -> Buckets:
        """Computes the buckets from training values [P, N]."""
        bounds = np.quantile(values, np.linspace(0, 1, BUCKETS + 1), axis=0).T.astype(np.float32)
        buckets = cls(bounds, bounds[:, :-1].copy())
        labels = buckets.labels(values)
        for expert, bucket in np.ndindex(buckets.means.shape):
            inside = values[labels[:, expert] == bucket, expert]
            if len(inside):
                buckets.means[expert, bucket] = inside.mean()
        return buckets

    def labels(self, values: np.ndarray) -> np.ndarray:
        """int32 [P, N], the bucket of each value [P, N]."""
        inner = self.bounds[:, 1:-1]
        values = values.astype(np.float32)
        return np.stack([np.searchsorted(b, v, "right") for b, v in zip(inner, values.T, strict=True)], 1).astype(
            np.int32
        )

    def expectation(self, probability: np.ndarray) -> np.ndarray:
        """The means [P, N] of the distributions [P, N, BUCKETS]."""
        return (probability * self.means).sum(axis=-1)

    def median(self, probability: np.ndarray) -> np.ndarray:
        """The medians [P, N] of the distributions [P, N, BUCKETS], which minimise the absolute error."""
        below = np.cumsum(probability, axis=-1) - probability
        bucket = (below <= 0.5).sum(axis=-1, keepdims=True) - 1
        mass = np.take_along_axis(probability, bucket, -1)
        share = np.clip((0.5 - np.take_along_axis(below, bucket, -1)) / np.maximum(mass, 1e-9), 0, 1)
        bounds = np.broadcast_to(self.bounds, (len(probability), *self.bounds.shape))
        low, high = (np.take_along_axis(bounds, bucket + end, -1) for end in (0, 1))
        return (low + share * (high - low))[..., 0]
