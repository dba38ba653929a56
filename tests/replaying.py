"""Runs many recorded lists of requests at once, padded to one shape, and gives results in the schedule files' terms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.simulator.recorded import Recording, replay_by_iterations, replay_by_jumps
from jaxroute.simulator.replay import engine_and_recording, result
from jaxroute.workload.request import Prefix
from tests.compiling import AS_USERS_GET
from tests.reference.caching import prefixes

_jit = functools.partial(jax.jit, compiler_options=AS_USERS_GET)
_by_jumps = _jit(jax.vmap(replay_by_jumps))
_by_iterations = _jit(jax.vmap(replay_by_iterations, in_axes=(0, 0, None)), static_argnums=2)


def _pad(recording: Recording, size: int) -> Recording:
    def pad(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, size - leaf.shape[0]), *[(0, 0)] * (leaf.ndim - 1)]) if leaf.ndim else leaf

    return jax.tree.map(pad, recording)


def _prefix(spec: dict[str, Any], order: np.ndarray, pieces: int) -> Prefix:
    more = lambda own: jnp.asarray(np.pad(own, ((0, 0), (0, pieces - own.shape[1]))))  # noqa: E731
    return Prefix(*map(more, prefixes(spec, order)))


class Batch:
    """Specs of one discipline on one padded shape; `by_jumps` and `by_iterations` give one result dictionary a spec."""

    def __init__(self, specs: list[dict[str, Any]], num_requests: int, pieces: int = 0, runs: int = 0):
        """With `pieces`, the engines have that many `prefix_pieces`, and as many `prefix_runs` as given."""
        parts = [engine_and_recording(spec, f"spec {index}") for index, spec in enumerate(specs)]
        if pieces:
            parts = [
                (
                    engine.replace(prefix_pieces=pieces, prefix_runs=runs),
                    recording.replace(prefix=_prefix(spec, order, pieces)),
                    order,
                    times,
                )
                for spec, (engine, recording, order, times) in zip(specs, parts, strict=True)
            ]
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        self.engine = jax.tree.map(stack, *(part[0] for part in parts))
        self.recording = jax.tree.map(stack, *(_pad(part[1], num_requests) for part in parts))
        self.ids = [part[2] for part in parts]
        self.times = [part[3] for part in parts]

    def _results(self, outcome: Any) -> list[dict[str, Any]]:
        outcome = jax.device_get(outcome)
        results = []
        for index, (ids, times) in enumerate(zip(self.ids, self.times, strict=True)):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], outcome)
            cut = jax.tree.map(lambda leaf, ids=ids: leaf[: len(ids)] if np.ndim(leaf) else leaf, one)
            totals = {
                "np": int(cut.work.prefill_tokens),
                "nd": int(cut.work.decodes),
                "ctx": int(cut.work.context_tokens),
            }
            results.append({**result(cut, ids, times, self.engine), "totals": totals})
        return results

    def by_jumps(self) -> list[dict[str, Any]]:
        return self._results(_by_jumps(self.recording, self.engine))

    def by_iterations(self, num_iterations: int) -> list[dict[str, Any]]:
        """As `by_jumps`, with `iterations`: a record each with the fields of the schedule files that are decided."""
        outcome, outputs, took_place, waiting = _by_iterations(self.recording, self.engine, num_iterations)
        results = self._results(outcome)
        outputs, took_place, waiting = jax.device_get((outputs, took_place, waiting))
        for index, (spec_result, ids) in enumerate(zip(results, self.ids, strict=True)):
            records = []
            for iteration in np.flatnonzero(took_place[index]):
                tokens = outputs.tokens[index, iteration]
                preempted = outputs.preempted[index, iteration]
                records.append(
                    {
                        "sched": {str(ids[slot]): int(tokens[slot]) for slot in np.flatnonzero(tokens)},
                        "np": int(outputs.prefill_tokens[index, iteration]),
                        "nd": int(outputs.decodes[index, iteration]),
                        "ctx": int(outputs.context_tokens[index, iteration]),
                        # vLLM preempts from the tail
                        "preempted": [str(ids[slot]) for slot in np.flatnonzero(preempted)[::-1]],
                        "waiting": int(waiting[index, iteration]),
                        "used_blocks": int(outputs.used_blocks[index, iteration]),
                    }
                )
            spec_result["iterations"] = records
        return results
