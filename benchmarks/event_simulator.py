"""A compiled event-driven simulator of the same engines (simulation.md sections 1 and 2), with which the suite compares
rates.

It consists of plain loops over one engine at a time, like vLLM's own loops, and shares no arithmetic with `jaxroute`.
A run of plain decode iterations is planned once, up to the next completion or unavailable block, and is only shortened
if a request joins the engine. Times are absolute, in float64. It needs numba.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import event_kernels as kernels
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.replay import engine_and_recording


class Arrivals(NamedTuple):
    """T requests at a cluster of N engines."""

    gap: np.ndarray  # float64 [T], s since the previous arrival
    prompt_tokens: np.ndarray  # int32 [T]
    output_tokens: np.ndarray  # int32 [T, N]
    score: np.ndarray  # float64 [T, N]


class Totals(NamedTuple):
    """Results of all requests, including those that finish after the last arrival."""

    completed: int
    qos: float
    rejected_full: int
    rejected_infeasible: int


def engine_records(params: EngineParams) -> np.ndarray:
    """Idle engines, `ENGINE` [N] (N = 1 if the parameters have no axis)."""
    params = jax.device_get(params)
    engines = np.zeros(np.size(params.usable_blocks), kernels.ENGINE)
    for name in kernels.LATENCY:
        engines[name] = getattr(params.latency, name)
    for name in kernels.OPTIONS:
        engines[name] = getattr(params, name)
    engines["decoding"] = 1
    return engines


def shortest_queue(params: EngineParams, slots: int, latency_limit: float, arrivals: Arrivals) -> Totals:
    """Routes all arrivals by Shortest Queue First (ties go to the lowest index) and runs the engines [N] until done."""
    count = len(arrivals.gap)
    served = np.zeros(count, kernels.SERVED)
    routed = np.zeros(count, kernels.ROUTED)
    gap, prompt, output, score = arrivals
    kernels.shortest_queue(engine_records(params), slots, gap, prompt, output, served, routed)
    return Totals(*kernels.totals(gap, score, latency_limit, served, routed))


class Replay(NamedTuple):
    """One engine and R requests in order of arrival, ready to run."""

    engine: np.ndarray  # ENGINE [1]; every run copies it
    ids: np.ndarray  # int [R], positions in the spec's list
    times: np.ndarray  # float64 [R], s; zeros with arrivals by iteration
    indices: np.ndarray  # int32 [R], iterations; zeros with arrivals by time
    by_iteration: bool
    prompt_tokens: np.ndarray  # int32 [R]
    output_tokens: np.ndarray  # int32 [R]
    most_iterations: int
    stall_iterations: int

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Replay:
        """Reads a spec of `jaxroute replay`, in float64. Raises `UserError`."""
        with jax.enable_x64(True):
            params, recording, ids, times = engine_and_recording(spec, "spec")
            return cls(
                engine_records(params),
                ids,
                times,
                np.asarray(recording.arrival_iteration),
                bool(recording.by_iteration),
                np.asarray(recording.prompt_tokens),
                np.asarray(recording.output_tokens),
                int(recording.max_iterations),
                int(recording.stall_iterations),
            )

    def run(self) -> tuple[str, np.ndarray, np.ndarray]:
        """The status, the results of requests (`SERVED` [R], in order of arrival), and the engine (`ENGINE` [])."""
        engine = self.engine.copy()
        queue = np.zeros(len(self.ids), kernels.REQUEST)
        served = np.zeros(len(self.ids), kernels.SERVED)
        served["first_token"] = served["finish"] = math.inf
        status = kernels.replay(engine, queue, *self[2:], served)
        return kernels.STATUS[status], served, engine[0]

    def result(self) -> dict[str, Any]:
        """Runs it; the result has the names of the schedule files, with `totals` of np, nd and ctx."""
        status, served, engine = self.run()
        when = lambda time: float(time) if math.isfinite(time) else None  # noqa: E731
        per_request = {
            str(self.ids[i]): {
                "first_token_time": when(served[i]["first_token"]),
                "finish_time": when(served[i]["finish"]),
                "preemptions": int(served[i]["preemptions"]),
                "emitted": int(served[i]["emitted"]),
            }
            for i in np.argsort(self.ids)
        }
        return {
            "status": status,
            "per_request": per_request,
            "summary": {
                "iterations": int(engine["iterations"]),
                "preemptions": int(served["preemptions"].sum()),
                "end_time": float(engine["clock"]),
            },
            "totals": {
                "np": int(engine["prefill_tokens"]),
                "nd": int(engine["decodes"]),
                "ctx": int(engine["context_tokens"]),
            },
        }
