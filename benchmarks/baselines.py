"""The two simulators that rates are compared with, on the same workload under Shortest Queue First: the compiled
event-driven simulator on as many cores as JAX has, and the plain Python reference on one core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Row, cores
from jaxroute.environment.state import EnvParams
from jaxroute.workload.request import Request
from tests.reference.cluster import Arrival, Cluster, Worth
from tests.rollouts import configs_of

try:
    from benchmarks import event_simulator
except ModuleNotFoundError as error:
    if error.name != "numba":
        raise
    event_simulator = None

ARRIVALS = 50_000
"""Number of requests that are drawn."""


def draw(params: EnvParams, seed: int, size: int) -> tuple[jax.Array, Request]:
    """Gaps float [size] (s) and requests, each field [size, ...], drawn from the distributions of the workload."""

    def one(key: jax.Array) -> tuple[jax.Array, Request]:
        _, gap, request = params.workload.sample(key, params.workload.reset(key))
        return gap, request

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), size))


def on_all_cores(work: Callable[[Any], Any], items: Sequence[Any], calls: int = 5) -> float:
    """Seconds in which one thread per item does `work(item)`: median of several calls after a warm-up call."""
    seconds = []
    with ThreadPoolExecutor(len(items)) as pool:
        for _ in range(calls + 1):
            start = time.perf_counter()
            list(pool.map(work, items))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


class Baselines:
    """The workload of an environment, drawn once; each call of `measure` times both simulators again."""

    def __init__(self, params: EnvParams, slots: int):
        self.params, self.slots, self.limit = params, slots, float(params.latency_limit)
        self.streams = [jax.device_get(draw(params, core, ARRIVALS)) for core in range(cores())]

    def measure(self, decisions: float, seconds: float) -> Row:
        """`event_rate` and `python_rate` in decisions/s, and the rate `decisions` relative to them.

        `seconds` is the time of the Python simulator. They are measured directly after the rate that they are compared
        with, since the speed of a machine changes. Without numba there is no event_rate.
        """
        event, python = self._event(), self._python(seconds)
        return {
            "event_rate": event,
            "python_rate": python,
            "times_event": event and decisions / event,
            "times_python": decisions / python,
        }

    def _event(self) -> float | None:
        if event_simulator is None:
            return None
        shortest_queue, streams = event_simulator.shortest_queue, []
        for gap, request in self.streams:
            gap, score = gap.astype(np.float64), request.score.astype(np.float64)
            streams.append(event_simulator.Arrivals(gap, request.prompt_tokens, request.output_tokens, score))
        work = lambda stream: shortest_queue(self.params.engines, self.slots, self.limit, stream)  # noqa: E731
        return ARRIVALS * len(streams) / on_all_cores(work, streams)

    def _python(self, seconds: float) -> float:
        cluster = Cluster(configs_of(self.params.engines), self.slots, Worth(self.limit))
        gaps, requests = self.streams[0]
        start, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds and done < ARRIVALS:
            lengths = [expert.queue_length() for expert in cluster.experts]
            prompt, output, score = requests.prompt_tokens, requests.output_tokens, requests.score
            arrival = Arrival(int(prompt[done]), output[done].tolist(), score[done].tolist())
            cluster.step(arrival, lengths.index(min(lengths)), float(gaps[done]))
            done += 1
        return done / elapsed


def event_note(rows: Sequence[Row]) -> str:
    """A note on the columns of ratios, with the rates for the setting of the first row."""
    first = rows[0]
    if first["event_rate"] is None:
        event = "x events: numba is not installed (extra `bench`)"
    else:
        event = f"x events: the compiled event-driven simulator on {cores()} core(s), {first['event_rate']:,.0f}/s"
    return f"{event}; x Python: the plain reference on one core, {first['python_rate']:,.0f}/s (both: first row)"
