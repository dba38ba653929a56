"""Writes episodes as a trace for Perfetto (https://ui.perfetto.dev) and Chrome's chrome://tracing.

The format is Google's "Trace Event Format"
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): JSON, times in microseconds.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from jaxroute.timelines.collect import DROPPED, FATES, REJECTED, Episode
from jaxroute.timelines.layout import BUSY, iteration_kind, merged, of_expert, single
from jaxroute.timelines.record import Pieces

Event = dict[str, Any]

MOST_ITERATIONS = 60_000
"""Maximum in all episodes; with more, decodes of an unchanged batch are one slice, which keeps the file small."""

MOST_CHARACTERS = 20_000_000
"""Maximum of a trace. A longer trace has fewer values of counters."""

_SPACINGS = (0, 0.1, 1.0)
"""Minimum seconds between two values of a counter; the first that makes the trace short enough is used."""

_MARK = 1000
"""Drawn microseconds of the arrival and routing of a request; less if the next one arrives earlier."""

_INSIDE = 20
"""Drawn microseconds between a token and the end of its iteration, so that the flow is within the iteration."""

_KV_STEP = 0.01
"""Smaller changes in the share of used KV blocks are not drawn."""


def trace_text(episodes: Sequence[Episode]) -> str:
    """The trace of these episodes with the same requests, as JSON with one event per line. Each episode is a process.

    A process has a thread of arrivals. For every expert it has a thread of the requests routed there, a thread of its
    iterations, with args prefill_tokens, decodes and context_tokens (np, nd and ctx of simulation.md section 2), and if
    it has disturbances a thread of them. There are counters of requests and KV use, and a flow for each request: its
    arrival, its expert, and the iterations that end with its first and its last token.
    Of a live server, a slice is a time in which the same requests stream.
    """
    every = sum(int(episode.pieces.iterations.sum()) for episode in episodes) <= MOST_ITERATIONS
    text = ""
    for spacing in _SPACINGS:
        about = {
            "iterations": "every iteration is a slice" if every else "decodes of an unchanged batch are one slice",
            "counters": f"at most every {spacing} s" if spacing else "where they change",
            "latency_limit_s": round(episodes[0].latency_limit, 6),
        }
        events = chain.from_iterable(
            _events(process, episode, every, spacing) for process, episode in enumerate(episodes, start=1)
        )
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        text = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n{lines}\n]}}\n'
        if len(text) < MOST_CHARACTERS:
            break
    return text


def _events(process: int, episode: Episode, every: bool, spacing: float) -> Iterator[Event]:
    experts = range(len(episode.experts))
    # Perfetto identifies a thread only by its number.
    arrivals, thread = 1000 * process, 1000 * process + 1
    names = {process: episode.label, arrivals: "arrivals"}
    for expert in experts:
        names[thread + 2 * expert] = f"{episode.experts[expert]}: routed"
        names[thread + 2 * expert + 1] = f"{episode.experts[expert]}: iterations"
    last = thread + 2 * len(experts)
    for expert in sorted({part.expert for part in episode.disturbed}):
        names[last + expert] = f"{episode.experts[expert]}: disturbances"
    for place, (number, name) in enumerate(names.items()):
        kind = "process" if number == process else "thread"
        key = {"ph": "M", "pid": process, "tid": number if kind == "thread" else arrivals}
        yield {**key, "name": f"{kind}_name", "args": {"name": name}}
        yield {**key, "name": f"{kind}_sort_index", "args": {"sort_index": place}}

    for expert in experts:
        own = of_expert(episode.pieces, expert)
        own = single(own) if every and own.iterations.any() else merged(own)
        yield from _iterations(process, thread + 2 * expert + 1, own)
        yield from _counters(process, episode, expert, own, spacing)
    for part in episode.disturbed:
        start, end = _microseconds([part.start, part.end])
        slice_ = {"name": part.label, "cat": "disturbance", "ph": "X", "ts": start, "dur": end - start}
        yield {**slice_, "pid": process, "tid": last + part.expert}
    yield from _requests(process, episode)


def _microseconds(seconds: np.ndarray | list[float]) -> list[int]:
    return np.rint(1e6 * np.asarray(seconds)).astype(np.int64).tolist()


def _iterations(process: int, thread: int, pieces: Pieces) -> Iterator[Event]:
    columns = (pieces.prefill_tokens, pieces.decodes, pieces.context, pieces.iterations, pieces.preempted)
    times = zip(_microseconds(pieces.start), _microseconds(pieces.end), strict=True)
    for (start, end), *counts in zip(times, *(column.tolist() for column in columns), strict=True):
        prefill_tokens, decodes, context, iterations, preempted = counts
        args = {"prefill_tokens": prefill_tokens, "decodes": decodes, "context_tokens": context}
        if iterations > 1:
            args |= {"iterations": iterations, "last_context_tokens": context + decodes * (iterations - 1)}
        if preempted:
            args["preempted"] = preempted
        name = iteration_kind(prefill_tokens, decodes)
        if not iterations:
            name, args = ("streaming" if decodes else "waiting"), {"requests": decodes}
        slice_ = {"name": name, "cat": "iteration", "ph": "X", "ts": start, "dur": max(end - start, 1)}
        yield {**slice_, "pid": process, "tid": thread, "args": args}


def _counters(process: int, episode: Episode, expert: int, pieces: Pieces, spacing: float) -> Iterator[Event]:
    """The counters where they change: at the start of a piece, and at the end of a piece before an idle time."""
    count, name = len(pieces.start), episode.experts[expert]
    idle = np.append(pieces.start[1:] - pieces.end[:-1] > BUSY, True)[:count]
    times = np.concatenate([pieces.start, pieces.end[idle]])
    order = np.argsort(times, kind="stable")
    share = pieces.blocks / episode.usable_blocks[expert]
    values = [np.append(field, np.zeros(idle.sum()))[order] for field in (pieces.running, pieces.waiting, share)]
    before, kv, next_time = None, -1.0, 0
    for time, running, waiting, share in zip(_microseconds(times[order]), *(v.tolist() for v in values), strict=True):
        if running and time < next_time:
            continue
        counter = {"ph": "C", "ts": time, "pid": process}
        requests = {"running": int(running), "waiting": int(waiting)}
        if requests != before:
            yield {**counter, "name": f"{name}: requests", "args": requests}
        if abs(share - kv) >= _KV_STEP or (share == 0) != (kv == 0):
            yield {**counter, "name": f"{name}: KV use", "args": {"percent": round(100 * share, 1)}}
            kv = share
        before, next_time = requests, time + 1e6 * spacing


def _requests(process: int, episode: Episode) -> Iterator[Event]:
    requests, arrivals = episode.requests, 1000 * process
    arrival = _microseconds(requests.arrival)
    count = len(arrival)
    for index, time in enumerate(arrival):
        expert, fate = int(requests.expert[index]), int(requests.fate[index])
        to_next = arrival[index + 1] - time if index + 1 < count else _MARK
        mark = {"cat": "request", "ph": "X", "ts": time, "dur": max(min(_MARK, to_next), 0), "pid": process}
        args = {"fate": FATES[fate], "prompt": int(requests.prompt_tokens[index])}
        if fate != DROPPED:
            args |= {"expert": episode.experts[expert], "score": round(float(requests.score[index]), 4)}
        if fate < DROPPED:
            args |= {
                "output": int(requests.output_tokens[index]),
                "latency_ms_per_token": round(1e3 * float(requests.latency_per_token[index]), 3),
                "preemptions": int(requests.preemptions[index]),
            }
        yield {**mark, "name": f"request {index}", "tid": arrivals, "args": args}
        if fate == DROPPED:
            continue
        routed = arrivals + 1 + 2 * expert
        flow = {"cat": "request", "name": "request", "id": (process - 1) * count + index + 1, "pid": process}
        yield {**mark, "name": f"request {index}", "tid": routed}
        yield {**flow, "ph": "s", "ts": time, "tid": arrivals}
        if fate == REJECTED:
            yield {**flow, "ph": "f", "bp": "e", "ts": time, "tid": routed}
            continue
        yield {**flow, "ph": "t", "ts": time, "tid": routed}
        first, last = (time - _INSIDE for time in _microseconds([requests.first_token[index], requests.finish[index]]))
        yield {**flow, "ph": "t", "ts": first, "tid": routed + 1}
        yield {**flow, "ph": "f", "bp": "e", "ts": last, "tid": routed + 1}
