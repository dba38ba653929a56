"""Arranges an episode for drawing: merged runs of decodes, requests in rows without overlap, queues over time."""

import heapq

import numpy as np

from jaxroute.timelines.collect import Episode, Requests
from jaxroute.timelines.record import Pieces

BUSY = 1e-5
"""Maximum s between two iterations of a busy engine, due to the rounding of its clock."""


def iteration_kind(prefill_tokens: int, decodes: int) -> str:
    """The kind of an iteration: prefill, decode, both (mixed) or nothing (empty)."""
    if prefill_tokens:
        return "mixed" if decodes else "prefill"
    return "decode" if decodes else "empty"


def of_expert(pieces: Pieces, expert: int) -> Pieces:
    """The pieces of one expert."""
    return Pieces(*(field[pieces.expert == expert] for field in pieces))


def merged(pieces: Pieces) -> Pieces:
    """The pieces, with consecutive decodes of one batch and equal numbers of waiting requests merged. `first` is then
    the mean duration of the iterations, and `growth` is 0. Pieces without iterations stay as they are.
    """
    if not pieces.iterations.any():
        return pieces
    same = np.diff(pieces.expert) == 0
    same &= np.abs(pieces.start[1:] - pieces.end[:-1]) < BUSY
    for field in (pieces.decodes, pieces.waiting):
        same &= np.diff(field) == 0
    plain = (pieces.prefill_tokens == 0) & (pieces.decodes > 0)
    same &= plain[1:] & plain[:-1] & (pieces.preempted[1:] == 0)
    begins = np.flatnonzero(np.append(True, ~same))
    last = np.append(begins[1:], len(pieces.start)) - 1
    whole = Pieces(*(field[begins] for field in pieces))
    iterations = np.add.reduceat(pieces.iterations, begins)
    end = pieces.end[last]
    return whole._replace(
        end=end,
        iterations=iterations,
        first=np.where(iterations > whole.iterations, (end - whole.start) / iterations, whole.first),
        growth=np.where(iterations > whole.iterations, 0, whole.growth),
        last_blocks=pieces.last_blocks[last],
    )


def single(pieces: Pieces) -> Pieces:
    """The pieces, with each iteration as a separate piece. KV blocks are interpolated."""
    source = np.repeat(np.arange(len(pieces.start)), pieces.iterations)
    each = Pieces(*(field[source] for field in pieces))
    number = np.arange(len(source)) - np.repeat(np.cumsum(pieces.iterations) - pieces.iterations, pieces.iterations)
    start = each.start + number * each.first + each.growth * (number * (number - 1) / 2)
    last = number == each.iterations - 1
    share = number / np.maximum(each.iterations - 1, 1)
    blocks = np.rint(each.blocks + share * (each.last_blocks - each.blocks)).astype(int)
    return each._replace(
        start=start,
        end=np.where(last, each.end, np.roll(start, -1)),
        iterations=np.ones_like(each.iterations),
        context=each.context + number * each.decodes * (each.prefill_tokens == 0),
        blocks=blocks,
        last_blocks=blocks,
        preempted=np.where(number == 0, each.preempted, 0),
    )


def rows(requests: Requests, expert: int) -> np.ndarray:
    """int [T]: a row for each request that `expert` served, which is the lowest free row at its arrival; -1: not served
    there. The highest row in use is therefore about the number of requests at the expert.
    """
    row = np.full(len(requests.arrival), -1)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for index in np.flatnonzero((requests.expert == expert) & np.isfinite(requests.finish)):
        while busy and busy[0][0] <= requests.arrival[index]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        row[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (requests.finish[index], int(row[index])))
    return row


def queues(episode: Episode, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int [N, G] each: numbers of running and of waiting requests at each expert at `times` [G], s."""
    pieces, counts = episode.pieces, []
    for expert in range(len(episode.experts)):
        own = of_expert(pieces, expert)
        piece = np.searchsorted(own.start, times, side="right") - 1
        busy = (piece >= 0) & (times < np.append(own.end, -1.0)[piece])
        counts.append([np.where(busy, np.append(field, 0)[piece], 0) for field in (own.running, own.waiting)])
    running, waiting = np.swapaxes(np.array(counts), 0, 1)
    return running, waiting
