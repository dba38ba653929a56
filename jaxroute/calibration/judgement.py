"""Errors of a simulated log against the measured one, on requests that it was not fitted to."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.calibration.candidates import Candidates, LogRequests, prompt_left, simulate
from jaxroute.calibration.logs import ServerLog, shared_segments
from jaxroute.calibration.search import METRICS
from jaxroute.simulator.cluster import AFTER_ALL
from jaxroute.simulator.engine import LARGE
from jaxroute.simulator.engine_config import BLOCK_SIZE, engine_from_config
from jaxroute.simulator.replay import replay

STATISTICS = ("mean", "p50", "p95", "p99")


class Server(NamedTuple):
    """A server to simulate the log on: engine options in the format of `jaxroute replay`, and its surroundings."""

    engine: dict[str, Any]
    num_engines: int = 1
    prefix_hits: float = 0.0
    request_overhead: float = 0.0


class Times(NamedTuple):
    """Times of every request, float64 [R], s; inf for events that did not happen."""

    first_token: np.ndarray
    finish: np.ndarray


def prompts(log: ServerLog, server: Server) -> np.ndarray:
    """Prompt tokens without the share that a prefix cache saves, int32 [R]."""
    if log.shared_tokens is None or not server.prefix_hits:
        return log.prompt_tokens
    size = server.engine.get("block_size", BLOCK_SIZE)
    left = prompt_left(jnp.asarray(log.prompt_tokens), jnp.asarray(log.shared_tokens), server.prefix_hits, size)
    return np.asarray(left)


def run(log: ServerLog, server: Server) -> Times:
    """Simulates the whole log: one engine as in `jaxroute replay`, several with the simulator of candidates.

    If the engine has a prefix cache, requests have the prefixes that the log says (`logs.shared_segments`).
    """
    if server.num_engines == 1:
        by_rules = server.engine.get("enable_prefix_caching", False)
        lengths = log.prompt_tokens if by_rules else prompts(log, server)
        columns = zip(log.arrival.tolist(), lengths.tolist(), log.output_tokens.tolist(), strict=True)
        requests = [
            {"arrival_time": arrival, "prompt_len": prompt, "output_len": output} for arrival, prompt, output in columns
        ]
        if by_rules:
            for request, segments in zip(requests, shared_segments(log), strict=True):
                request["segments"] = segments
        result = replay({"config": server.engine, "requests": requests}, str(log.path))["per_request"]
        rows = [result[str(position)] for position in range(len(log))]
        first, finish = (
            np.asarray([np.inf if row[key] is None else row[key] for row in rows])
            for key in ("first_token_time", "finish_time")
        )
    else:
        out = _simulate(log, server)
        first, finish = np.asarray(out.first_token, np.float64)[:, 0], np.asarray(out.finish, np.float64)[:, 0]
    return Times(first + server.request_overhead, finish + server.request_overhead)


def series(log: ServerLog, server: Server) -> dict[str, np.ndarray]:
    """t (s), running and waiting over time, summed over the engines, from every round of the simulation."""
    out = _simulate(log, server, 60 * len(log) + 1000)
    assert out.series is not None
    events = []
    for engine in range(server.num_engines):
        start, running, waiting = (np.asarray(values)[:, engine, 0] for values in out.series)
        taken = running >= 0
        steps = [np.diff(values[taken], prepend=0) for values in (running, waiting)]
        events.append(np.stack([start[taken], *steps]))
    time, *steps = np.concatenate(events, axis=1)
    order = np.argsort(time, kind="stable")
    running, waiting = (np.cumsum(step[order]) for step in steps)
    return {"t": time[order], "running": running, "waiting": waiting}


def _simulate(log: ServerLog, server: Server, num_rounds: int = 0) -> Any:
    engine = engine_from_config(server.engine, str(log.path))
    one = jax.tree.map(lambda leaf: leaf[None], engine)
    requests = LogRequests(
        jnp.asarray(log.arrival, float),
        jnp.asarray(prompts(log, server), jnp.int32),
        jnp.asarray(log.output_tokens, jnp.int32),
        jnp.asarray(np.zeros(len(log)) if log.shared_tokens is None else log.shared_tokens, jnp.int32),
    )
    servers = Candidates(one, jnp.zeros(1))
    latest, rounds = jnp.asarray(AFTER_ALL, float), jnp.int32(LARGE)
    return simulate(servers, requests, latest, rounds, len(log), server.num_engines, num_rounds)


def statistics(values: np.ndarray) -> dict[str, float]:
    """The `STATISTICS` of latencies."""
    quantiles = np.nanquantile(values, (0.5, 0.95, 0.99))
    return dict(zip(STATISTICS, map(float, (np.nanmean(values), *quantiles)), strict=True))


def judge(log: ServerLog, times: Times, among: np.ndarray) -> dict[str, Any]:
    """Errors on the requests `among` (bool [R]). Per metric: measured and simulated statistics, s, their relative
    errors, and the median of the relative errors of single requests; and the makespan of the whole log.
    """
    measured, simulated = log.measured, log.latencies(times.first_token, times.finish)
    found: dict[str, Any] = {}
    for name in METRICS:
        real, ours = measured[name][among], simulated[name][among]
        if not np.isfinite(real).any():
            continue
        own, other = statistics(real), statistics(ours)
        found[name] = {
            "measured": own,
            "simulated": other,
            "error": {key: other[key] / own[key] - 1 if own[key] else float("nan") for key in own},
            "median_error": float(np.nanmedian(np.abs(ours / np.where(real > 0, real, np.nan) - 1))),
        }
    found["makespan"] = {
        "measured": float(log.finish.max()),
        "simulated": float(times.finish.max()),
        "error": float(times.finish.max() / log.finish.max() - 1),
    }
    return found


def load_at_arrival(log: ServerLog) -> np.ndarray:
    """Number of requests in the server at each arrival, int [R]."""
    ended = np.sort(log.finish)
    return np.arange(len(log)) - np.searchsorted(ended, log.arrival)


class Split(NamedTuple):
    """A split of the log: one part is fitted, and errors are computed on the other."""

    name: str
    fitted: np.ndarray  # bool [R]


def splits(log: ServerLog) -> list[Split]:
    """The splits: by parity of the ids, which is the main one; the first half against the second; and, if the load at
    arrival has several levels, the lower half of the load against the upper half.
    """
    by_parity = log.ids % 2 == 0
    if not 0.25 <= by_parity.mean() <= 0.75:
        by_parity = np.arange(len(log)) % 2 == 0
    found = [Split("even ids fitted, odd ids judged", by_parity)]
    found.append(Split("first half fitted, second half judged", np.arange(len(log)) < len(log) // 2))
    load = load_at_arrival(log)
    low, middle, high = np.quantile(load, (0.1, 0.5, 0.9))
    by_load = load <= middle
    # If the load of a log only increases, the lower loads are its first half.
    if high >= 2 * low + 4 and 0.2 <= by_load.mean() <= 0.8 and (by_load == found[-1].fitted).mean() < 0.9:
        found.append(Split("lower loads fitted, higher loads judged", by_load))
    return found
