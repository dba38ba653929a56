"""Changes during an episode: experts slow down, fail and recover, and the quality of their answers changes.

A change happens at a number of decisions in the episode. The state contains this number anyway, so environments
without disturbances are the same program, and a change happens at the same request for every router.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxroute.errors import UserError
from jaxroute.simulator.latency import LatencyModel
from jaxroute.workload.request import Request

FAILED = 1000.0
"""Slowness of a failed expert. An iteration takes some ten seconds, so no request on it meets a limit, and the
iteration in progress when the expert recovers ends soon afterwards."""


class Disturbances(struct.PyTreeNode):
    """K pieces of an episode; the first begins at decision 0. Every field is traced.

    Predictions do not change: a router sees the current speed of an expert in its features, but not its quality.
    `EnvParams.engines`, with which planning routers simulate, have the undisturbed speeds.
    """

    starts: jax.Array  # int32 [K], first decision of each piece, ascending from 0
    slowness: jax.Array  # float [K, N]: factor of the duration of an expert's iterations
    quality: jax.Array  # float [K, N]: factor of the scores of arriving requests, which are then clipped to 0..1

    @classmethod
    def create(
        cls,
        starts: Sequence[int],
        slowness: Sequence[Sequence[float]] | np.ndarray | None = None,
        quality: Sequence[Sequence[float]] | np.ndarray | None = None,
    ) -> Disturbances:
        """`slowness` or `quality` may be left out; its factors are then 1. Raises `UserError`."""
        begin = np.asarray(starts)
        if begin.ndim != 1 or not begin.size or begin[0] != 0 or (np.diff(begin) <= 0).any():
            raise UserError(f"disturbances: starts must be decisions in ascending order from 0, not {begin.tolist()}")
        given = [np.asarray(table, np.float64) for table in (slowness, quality) if table is not None]
        for table in given:
            if table.ndim != 2 or table.shape != (len(begin), given[0].shape[1]):
                raise UserError(
                    f"disturbances need a row for each of {len(begin)} starts, with a factor for each expert"
                )
            if not (np.isfinite(table).all() and (table >= 0).all()):
                raise UserError("disturbances: factors must be finite numbers of 0 or more")
        if slowness is not None and not given[0].all():
            raise UserError(f"disturbances: slowness must be above 0; use {FAILED:.0f} for an expert that has failed")
        if not given:
            raise UserError("disturbances need slowness or quality")
        ones = np.ones_like(given[0])
        slow, good = (jnp.asarray(ones if table is None else table, float) for table in (slowness, quality))
        return cls(jnp.asarray(begin, jnp.int32), slow, good)

    def shortened(self, share: float) -> Disturbances:
        """The same pieces in an episode that has `share` of the requests."""
        return self.replace(starts=jnp.round(self.starts * share).astype(jnp.int32))  # type: ignore[attr-defined]

    def _row_at(self, table: jax.Array, decision: jax.Array) -> jax.Array:
        """The row of `table` [K, N, ...] at `decision` (int32 [...]), [N, ...]."""
        piece = jnp.sum(self.starts <= decision, axis=0) - 1
        index = jnp.arange(table.shape[0]).reshape(-1, *[1] * piece.ndim)
        return jnp.sum(jnp.where((index == piece)[:, None], table, 0), axis=0)

    def slowed(self, latency: LatencyModel, decision: jax.Array) -> LatencyModel:
        """The latency model [N, ...] of iterations that start between `decision` and the next decision."""
        slowness = self._row_at(self.slowness, decision)
        times = {
            name: getattr(latency, name) * slowness for name in latency.__dataclass_fields__ if name != "knee_tokens"
        }
        return latency.replace(**times)

    def with_quality(self, request: Request, decision: jax.Array) -> Request:
        """The request with its true scores if it arrives at `decision`."""
        score = jnp.clip(request.score * self._row_at(self.quality, decision), 0.0, 1.0)
        return request.replace(score=score)  # type: ignore[attr-defined]
