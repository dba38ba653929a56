"""The record of `jaxroute serve` as an episode, and the simulation of the same choices beside it.

What a front end sees of a server are the tokens that come, so a live episode has no iterations and no preemptions. The
simulated one has the recorded times, lengths and choices, and the engines that the record names. A request that ended
without an answer counts as one of the tokens that had come.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import params_of
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.evaluation.tables import ROWS
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import latency_model
from jaxroute.timelines.collect import DROPPED, MET, MISSED, REJECTED, Episode, Requests, episode_pieces
from jaxroute.timelines.record import Pieces, Routed, replay
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload
from jaxroute.workload.files import json_object, read_lines
from jaxroute.workload.request import Request

MOST_REQUESTS = 5000
"""The last ones of a longer record are drawn."""


class Record(NamedTuple):
    """A run of a front end: T requests in the order of their arrival at an expert, those that it dropped included."""

    router: str
    experts: tuple[str, ...]
    engines: EngineParams  # each field [N]
    slots: int
    latency_limit: float
    left_out: int  # requests before the first of these
    expert: np.ndarray  # int [T], -1: dropped
    limit: np.ndarray  # float [T], s per output token
    arrival: np.ndarray  # float64 [T], s since the first
    first_token: np.ndarray  # float64 [T], s since the first arrival, as is the next
    finish: np.ndarray
    tokens: np.ndarray  # int [T], that came; 0: none
    prompt_tokens: np.ndarray  # int [T]
    score: np.ndarray  # float [T], predicted
    met: np.ndarray  # bool [T]


def load_record(path: Path) -> Record:
    """The last run in LOG.jsonl of `jaxroute serve --record`. Raises `UserError`."""
    notes = [(place, json_object(place, line)) for place, line in read_lines(path)]
    starts = [note for _, note in notes if "experts" in note]
    if not starts:
        raise UserError(f"{path}: no cluster in it; name the LOG.jsonl that jaxroute serve --record LOG.jsonl wrote")
    start = starts[-1]
    run, names = start["run"], tuple(expert["name"] for expert in start["experts"])
    engines = {expert["name"]: expert["engine"] for expert in start["experts"]}
    lines: list[tuple[float, int, dict[str, Any]]] = []
    for _, note in notes:
        if note.get("run") == run and "measured" in note:
            engines[note["measured"]] = note["engine"]
        elif note.get("run") == run and "dropped" in note:
            lines.append((note["arrival_time"], -1, note))
    unknown = [name for name, engine in engines.items() if engine is None]
    if unknown:
        raise UserError(f"{path}: the engine of {', '.join(unknown)} had not been measured when the record ended")
    for number, expert in enumerate(start["experts"]):
        lines += [(line["sent_time"], number, line) for line in _of_run(path.with_name(expert["file"]), run)]
    if not lines:
        raise UserError(f"{path}: no request in it since the last start")
    lines.sort(key=lambda line: line[0])
    kept = lines[-MOST_REQUESTS:]
    origin = kept[0][0]
    column = lambda key, other: np.array([line.get(key, other) for *_, line in kept])  # noqa: E731
    tokens = column("streamed_tokens", 0)
    seen = lambda key: np.where(tokens > 0, column(key, np.nan) - origin, np.nan)  # noqa: E731
    return Record(
        router=start["router"],
        experts=names,
        engines=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_engine(engines[name]) for name in names)),
        slots=start["slots"],
        latency_limit=start["latency_limit"],
        left_out=len(lines) - len(kept),
        expert=np.array([expert for _, expert, _ in kept]),
        limit=column("latency_limit", start["latency_limit"]),
        arrival=np.array([time for time, *_ in kept]) - origin,
        first_token=seen("first_token_time"),
        finish=seen("finish_time"),
        tokens=tokens,
        prompt_tokens=column("prompt_tokens", 1),
        score=column("predicted_score", 0.0),
        met=column("met", False),
    )


def _of_run(path: Path, run: str) -> Iterator[dict[str, Any]]:
    lines = (json_object(place, line) for place, line in read_lines(path))
    return (line for line in lines if line["request_id"].startswith(run + "-"))


def _engine(options: dict[str, Any]) -> EngineParams:
    """The engine of its options in a record."""
    values = {name: jnp.asarray(value) for name, value in options.items() if name != "latency"}
    latency = latency_model(options["latency"], "the record")
    return EngineParams(latency=latency, **values)  # pyright: ignore[reportArgumentType]


def live_episodes(record: Record) -> list[Episode]:
    """The record as an episode, and the same requests and choices simulated."""
    fate = np.where(record.expert < 0, DROPPED, np.where(record.tokens == 0, REJECTED, MISSED))
    live = _requests(record, np.where(record.met, MET, fate))
    simulated, pieces = _simulate(record, live)
    usable = np.asarray(record.engines.usable_blocks)
    both = ((f"Live, {record.router}", live, _streams(record)), ("Simulated", simulated, pieces))
    return [
        Episode(label, record.experts, usable, record.latency_limit, requests, own, _metrics(requests), ())
        for label, requests, own in both
    ]


def _requests(record: Record, fate: np.ndarray) -> Requests:
    count = len(fate)
    return Requests(
        arrival=record.arrival,
        expert=record.expert,
        fate=fate,
        admitted=np.full(count, np.nan),
        first_token=record.first_token,
        finish=record.finish,
        latency_per_token=(record.finish - record.arrival) / np.maximum(record.tokens, 1),
        preemptions=np.zeros(count, int),
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.tokens,
        score=record.score,
    )


def _simulate(record: Record, live: Requests) -> tuple[Requests, Pieces]:
    """The requests of the record at simulated engines. Those that were rejected live do not arrive there."""
    count, experts = len(record.arrival), len(record.experts)
    served = live.fate < DROPPED
    env = RoutingEnvironment(
        num_experts=experts, slots=record.slots, episode_length=count, metrics="off", penalty="off"
    )
    workload = Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create([0.5] * experts))
    params: EnvParams = params_of(workload, record.engines, record.latency_limit, 256.0).replace(workload=None)
    lengths = np.broadcast_to(np.maximum(record.tokens, 1).astype(np.int32)[:, None], (count, experts))
    scores = np.broadcast_to(record.score.astype(np.float32)[:, None], (count, experts))
    gap = np.append(np.diff(record.arrival), 0.0)
    request = Request(record.prompt_tokens.astype(np.int32), lengths, scores, lengths, scores)  # pyright: ignore
    action = np.where(served, record.expert, experts).astype(np.int32)
    routed = Routed(request, action, gap.astype(np.float32))  # pyright: ignore[reportArgumentType]
    log, results = jax.device_get(replay(env, jax.tree.map(jnp.asarray, routed), params))
    per_token = np.asarray(results.latency) / np.maximum(results.tokens, 1)
    done = served & np.isfinite(results.latency)
    met = done & (per_token < record.limit)
    requests = live._replace(
        fate=np.where(served, np.where(met, MET, np.where(done, MISSED, REJECTED)), live.fate),
        admitted=record.arrival + results.admitted,
        first_token=record.arrival + results.first_token,
        finish=record.arrival + results.latency,
        latency_per_token=per_token,
        preemptions=np.asarray(results.preemptions),
        output_tokens=np.asarray(results.tokens),
    )
    return requests, episode_pieces(log, np.append(record.arrival, record.arrival[-1]))


def _streams(record: Record) -> Pieces:
    """The times between two events of a server, as pieces without iterations. Blocks are by tokens, spread evenly."""
    rows: list[tuple[float, ...]] = []
    block_size = np.asarray(record.engines.block_size)
    for expert in range(len(record.experts)):
        own = (record.expert == expert) & (record.tokens > 0)
        sent, first, last = record.arrival[own], record.first_token[own], record.finish[own]
        prompt, tokens = record.prompt_tokens[own], record.tokens[own]
        events = np.unique(np.concatenate([sent, first, last]))
        for start, end in itertools.pairwise(events):
            streaming = (first <= start) & (start < last)
            waiting = int(((sent <= start) & (start < first)).sum())
            running = int(streaming.sum())
            if running + waiting:
                share = (start - first[streaming]) / (last - first)[streaming]
                held = np.ceil((prompt[streaming] + tokens[streaming] * share) / block_size[expert]).sum()
                rows.append((expert, start, end, 0, 0, running, 0, 0, 0, held, held, running, waiting, 0))
    table = np.array(rows, float).reshape(-1, len(Pieces._fields))
    times = ("start", "end", "first", "growth")
    columns = zip(Pieces._fields, table.T, strict=True)
    return Pieces(*(column if name in times else column.astype(int) for name, column in columns))


def _metrics(requests: Requests) -> dict[str, np.ndarray]:
    """Metrics of the page's table that follow from times of requests; the others are NaN."""
    done, met = requests.fate < DROPPED, requests.fate == MET
    ttft = requests.first_token - requests.arrival
    several = done & (requests.output_tokens > 1)
    tpot = (requests.finish - requests.first_token)[several] / (requests.output_tokens[several] - 1)
    found = {
        "qos": (requests.score * met).mean(),
        "score": _mean(requests.score[done]),
        "violation_rate": _mean((requests.fate == MISSED)[done]),
        "drop_rate": (requests.fate == DROPPED).mean(),
        "rejection_rate": (requests.fate == REJECTED).mean(),
    }
    for name, values in (("latency_per_token", requests.latency_per_token[done]), ("ttft", ttft[done]), ("tpot", tpot)):
        found |= {name: _mean(values), f"{name}_p95": np.quantile(values, 0.95) if len(values) else np.nan}
    if np.isfinite(requests.admitted).any():
        found["preemptions"] = requests.preemptions[done].sum()
    return {name: np.asarray(found.get(name, np.nan)) for name in ("qos", *(name for _, name, _, _ in ROWS))}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
