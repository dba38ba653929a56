"""Plain Python forms of the action impact estimator, request by request (simulation.md section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tests.reference import engine as reference


@dataclass
class Queued:
    """A request in an engine's queue. Tokens are counts, `age` is in seconds since arrival."""

    running: bool
    prompt: int
    generated: int
    computed: int
    true_tokens: int
    age: float
    score: float
    predicted_score: float
    predicted_tokens: int

    @property
    def expected_tokens(self) -> int:
        """Output to expect: the prediction, or one more than there is already."""
        return max(self.predicted_tokens, self.generated + 1)


@dataclass
class Queue:
    """An engine's queue in order, and the request that may join it."""

    config: dict[str, Any]
    engine: str  # a name of `engine.ENGINES`
    clock: float  # start of the next iteration, seconds from now
    requests: list[Queued]
    prompt: int
    true_tokens: int
    predicted_tokens: int


def _context(prompt: int, iterations: int) -> int:
    return sum(prompt + k for k in range(1, iterations + 1))


Latencies = list[tuple[float, float, float]]
"""For each request: what it counts if it is charged, and its seconds per token without and with the joining request."""


def penalty(latencies: Latencies, limit: float) -> float:
    """The sum over the requests that turn from met to missed."""
    return sum(charge for charge, without, joined in latencies if without < limit <= joined)


def paper(queue: Queue, k1: float, k2: float) -> Latencies:
    """The paper's: true lengths and scores, running requests, whoever ends above the limit, met before or not."""
    latencies = []
    for request in queue.requests:
        if request.running:
            together = max(min(request.true_tokens - request.generated, queue.true_tokens) - 1, 0)
            added = (k1 * queue.prompt + k2 * _context(queue.prompt, together)) / request.true_tokens
            so_far = request.age / request.generated if request.generated else 0.0
            latencies.append((request.score, -math.inf, so_far + added))
    return latencies


def predicted(queue: Queue) -> Latencies:
    """Ours: predictions, the engine's own latency model, waiting requests too."""
    config = queue.config
    _, c1, c2, c3, knee, c4 = [*config["latency"], 0, 0][:6]

    def prefill(tokens: int) -> float:
        return c1 * tokens + c4 * max(tokens - knee, 0)

    running = [request for request in queue.requests if request.running]
    batch = len(running) + 1  # decode iterations are those of the running batch and one request more
    context = sum(request.computed for request in running) + batch
    iteration = reference.duration(config["latency"], 0, batch, context)
    # Mean time between two completions of the running batch: its mean remaining time over its size.
    turnover = 0.0
    if running:
        mean = iteration * sum(request.expected_tokens - request.generated for request in running) / len(running)
        turnover = mean / len(running)

    engine = reference.ENGINES[queue.engine](config)
    room = engine.usable_blocks - (engine.watermark if isinstance(engine, reference.EngineV0) else 0)
    reserves = isinstance(engine, reference.EngineOrca)
    latencies, blocks, to_prefill, unseated = [], 0, 0.0, 0
    for seat, request in enumerate(queue.requests, start=1):
        remaining = request.expected_tokens - request.generated
        together = max(min(remaining, queue.predicted_tokens) - 1, 0)
        added = prefill(queue.prompt) + c2 * together + c3 * _context(queue.prompt, together)
        held = request.computed if request.running else request.prompt + request.generated
        blocks += engine.blocks_for(config["max_model_len"] if reserves else held)
        if request.running:
            without = request.age / max(request.generated, 1)
        else:
            to_prefill += prefill(held)
            if blocks > room or seat > config["max_num_seqs"]:
                unseated += 1
            finish = max(queue.clock, 0.0) + to_prefill + turnover * unseated + iteration * remaining
            without = (request.age + finish) / request.expected_tokens
        latencies.append((request.predicted_score, without, without + added / request.expected_tokens))
    return latencies


def exact(queue: Queue) -> Latencies:
    """Ours, with the engine run to its end with and without the request, on predicted lengths."""
    scores = [request.predicted_score for request in queue.requests]
    return list(zip(scores, _run(queue, False), _run(queue, True)[: len(scores)], strict=True))


def gain(queue: Queue, own_score: float, limit: float, truth: bool) -> float:
    """QoS of all requests there with the one that joins, less that without it; from predictions, or from the truth."""
    scores = [request.score if truth else request.predicted_score for request in queue.requests]

    def qos(latencies: list[float], scores: list[float]) -> float:
        return sum(score for score, latency in zip(scores, latencies, strict=True) if latency < limit)

    return qos(_run(queue, True, truth), [*scores, own_score]) - qos(_run(queue, False, truth), scores)


def joining_latency(queue: Queue) -> float:
    """Seconds per token of the request that joins, in a run on predicted lengths; infinite if it never ends."""
    return _run(queue, True)[-1]


def _run(queue: Queue, joins: bool, truth: bool = False) -> list[float]:
    """Seconds per token of each queued request in the end, then of the joining one; infinite if it never ends."""
    engine = reference.ENGINES[queue.engine]({**reference.DEFAULT_CONFIG, **queue.config})
    present = []
    reserves = isinstance(engine, reference.EngineOrca)
    room = engine.usable_blocks * queue.config["block_size"] + 1  # longer predictions are cut to what the cache holds
    for request in queue.requests:
        entry = reference.Request(
            str(len(present)),
            -request.age,
            request.prompt,
            request.true_tokens
            if truth
            else max(min(request.expected_tokens, room - request.prompt), request.generated + 1),
            request.generated,
            request.computed,
        )
        present.append(entry)
        if request.running:
            entry.blocks = engine.blocks_for(queue.config["max_model_len"] if reserves else request.computed)
            engine.free_blocks -= entry.blocks
            engine.running.append(entry)
        else:
            engine.waiting.append(entry)
    clock = queue.clock if present else max(queue.clock, 0.0)
    if joins and queue.prompt < room:
        tokens = min(queue.true_tokens if truth else queue.predicted_tokens, room - queue.prompt)
        present.append(reference.Request("joined", 0.0, queue.prompt, tokens))
        engine.waiting.append(present[-1])
    while engine.running or engine.waiting:
        entries, preempted = engine.schedule()
        if not entries and not preempted:
            break  # by its predicted length a request cannot fit, and nobody behind it gets on
        decodes = sum(n == 1 and r.generated > 0 and r.computed == r.length - 1 for r, n in entries)
        prefill = sum(n for _, n in entries) - decodes
        context = sum(r.computed + n for r, n in entries)
        clock += reference.duration(queue.config["latency"], prefill, decodes, context)
        for request in engine.compute(entries)[1]:
            request.finish_time = clock
    return [
        math.inf if request.finish_time is None else (request.finish_time - request.arrival) / request.generated
        for request in present
    ]
