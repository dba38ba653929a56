"""Plain Python reference of one serving engine under each discipline: the oracle for tests of the JAX simulator.

It is written from the rules in words alone (loops, a deque, a list, one small object a request), one iteration at a
time, and is checked against recorded runs of vLLM's own schedulers, 0.19.1's V1 and 0.6.6's V0, in
`tests/test_reference.py`. It is meant to be read, not to be fast, and shares no code with `jaxroute`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_CONFIG: dict[str, Any] = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "enable_chunked_prefill": True,
    "block_size": 16,
    "num_gpu_blocks": 10001,
    "max_model_len": 8192,
    "reserve_full_isl": True,
    "long_prefill_token_threshold": 0,
    "latency": [2.0**-8, 2.0**-14, 2.0**-16, 2.0**-24],
    "max_iterations": 1_000_000,
    "stall_iterations": 3,
}


@dataclass
class Request:
    """One request in the engine. `prompt`, `output`, `generated`, `computed` count tokens; times are seconds."""

    id: str
    arrival: float  # seconds, or an iteration index
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    preemptions: int = 0
    first_sched_iter: int | None = None
    first_token_iter: int | None = None
    first_token_time: float | None = None
    finish_iter: int | None = None
    finish_time: float | None = None
    ignored_iter: int | None = None

    @property
    def length(self) -> int:
        return self.prompt + self.generated


class Engine:
    """vLLM's V1: waiting deque, running list (in admission order) and a count of free KV blocks."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.usable_blocks = config["num_gpu_blocks"] - 1  # vLLM keeps one null block
        self.free_blocks = self.usable_blocks
        self.ignored: list[Request] = []  # those that the last scheduling dropped; V0's alone does

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config["block_size"])

    def cap_long_prefill(self, tokens: int) -> int:
        threshold = self.config["long_prefill_token_threshold"]
        return min(tokens, threshold) if threshold > 0 else tokens

    def grow(self, request: Request, tokens: int) -> bool:
        """Takes the blocks that `tokens` more computed tokens need; False, and nothing taken, if they are not free."""
        missing = self.blocks_for(request.computed + tokens) - request.blocks
        if missing > self.free_blocks:
            return False
        self.free_blocks -= missing
        request.blocks += missing
        return True

    def release(self, request: Request) -> None:
        self.free_blocks += request.blocks
        request.blocks = 0

    def preempt_last(self) -> Request:
        victim = self.running.pop()
        self.release(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def schedule(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Decides one iteration. Returns (entries, preempted): entries are (request, tokens) in scheduling order."""
        config = self.config
        budget = config["max_num_batched_tokens"]
        entries: list[tuple[Request, int]] = []
        preempted: list[Request] = []

        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            tokens = self.cap_long_prefill(request.length - request.computed)
            tokens = min(tokens, budget, config["max_model_len"] - 1 - request.computed)
            if tokens <= 0:
                position += 1
                continue
            fits = self.grow(request, tokens)
            while not fits:
                victim = self.preempt_last()
                preempted.append(victim)
                if victim is request:
                    break
                fits = self.grow(request, tokens)
            if not fits:
                break  # the requester itself was the last one: nobody is left behind it
            entries.append((request, tokens))
            budget -= tokens
            position += 1

        while not preempted and self.waiting and budget > 0 and len(self.running) < config["max_num_seqs"]:
            request = self.waiting[0]
            tokens = self.cap_long_prefill(request.length)
            if tokens > budget and not config["enable_chunked_prefill"]:
                break
            tokens = min(tokens, budget)
            if config["reserve_full_isl"] and self.free_blocks < self.blocks_for(request.length):
                break
            if not self.grow(request, tokens):
                break
            self.waiting.popleft()
            self.running.append(request)
            entries.append((request, tokens))
            budget -= tokens

        return entries, preempted

    def compute(self, entries: list[tuple[Request, int]]) -> tuple[list[Request], list[Request], list[Request]]:
        """Executes the entries. Returns the requests that got a token; of these, the ones that are finished now; and
        the ones that leave the engine now, as those do.
        """
        sampled, finished = [], []
        for request, tokens in entries:
            request.computed += tokens
            if request.computed < request.length:
                continue
            request.generated += 1
            sampled.append(request)
            if request.generated >= request.output or request.length >= self.config["max_model_len"]:
                finished.append(request)
        for request in finished:
            self.release(request)
            self.running.remove(request)
        return sampled, finished, finished


class EngineV0(Engine):
    """vLLM's V0: an iteration prefills or decodes, admissions leave a watermark free, and what cannot fit is ignored.

    With asynchronous output processing `stopped` holds the requests that have had their last token, but still have
    seat and blocks; the next iteration notices.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.free_blocks = self.usable_blocks = config["num_gpu_blocks"]  # no null block
        self.watermark = int(config["watermark"] * config["num_gpu_blocks"])
        self.longest, self.budget = config["max_model_len"], config["max_num_batched_tokens"]
        self.stopped: list[Request] = []

    def schedule(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        self.ignored = []
        entries = self._admit()
        return (entries, []) if entries else self._decode()

    def _admit(self) -> list[tuple[Request, int]]:
        entries, tokens = [], 0
        while self.waiting:
            request = self.waiting[0]
            need = self.blocks_for(request.length)
            if request.length > min(self.longest, self.budget) or self.usable_blocks - need < self.watermark:
                self.ignored.append(self.waiting.popleft())
                continue
            if self.free_blocks - need < self.watermark or tokens + request.length > self.budget:
                break
            if len(self.running) == self.config["max_num_seqs"]:
                break
            self.free_blocks -= need
            request.blocks = need
            tokens += request.length
            self.running.append(self.waiting.popleft())
            entries.append((request, request.length))
        return entries

    def _decode(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        entries, preempted, handled, left = [], [], [], list(self.running)
        while left:
            request = left.pop(0)
            if request in self.stopped and request.length > self.longest:
                handled.append(request)
                continue
            while self.free_blocks == 0:
                victim = left.pop() if left else request
                self.release(victim)
                if victim not in self.stopped:  # else it has finished, and only goes
                    victim.computed = 0
                    victim.preemptions += 1
                    self.waiting.appendleft(victim)
                    preempted.append(victim)
                if victim is request:
                    break
            if request.blocks == 0:
                break  # it was its own victim, and nobody is left behind it
            if request.length > request.blocks * self.config["block_size"]:
                self.free_blocks -= 1
                request.blocks += 1
            handled.append(request)
            entries.append((request, 1))
        self.running = handled
        return entries, preempted

    def compute(self, entries: list[tuple[Request, int]]) -> tuple[list[Request], list[Request], list[Request]]:
        """As V1's, but with asynchronous output processing what finishes now leaves an iteration later."""
        for request, tokens in entries:
            request.computed += tokens
        sampled = [request for request, _ in entries if request not in self.stopped]
        for request in sampled:
            request.generated += 1
        finished = [r for r in sampled if r.length > self.longest or r.generated >= r.output]
        leaving = finished
        if self.config["async_output_proc"]:
            leaving, self.stopped = self.stopped, finished
        for request in leaving:
            self.release(request)
        self.running = [request for request in self.running if request not in leaving]
        return sampled, finished, leaving


class EngineOrca(Engine):
    """Orca: the longest sequence's blocks are reserved at admission and kept to the end, so nobody is preempted."""

    def schedule(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        entries = [(request, 1) for request in self.running]
        reserved = self.blocks_for(self.config["max_model_len"])
        while self.waiting and len(self.running) < self.config["max_num_seqs"] and self.free_blocks >= reserved:
            request = self.waiting.popleft()
            request.blocks = reserved
            self.free_blocks -= reserved
            self.running.append(request)
            entries.append((request, request.length))
        return entries, []


ENGINES: dict[str, type[Engine]] = {"V1": Engine, "V0": EngineV0, "orca": EngineOrca}
"""By the name that a file's `engine` gives them."""


def duration(latency: list[float], prefill_tokens: int, decodes: int, context: int) -> float:
    """Seconds of an iteration. `latency`: [c0, c1, c2, c3] or [c0, c1, c2, c3, knee tokens, c4 per token above it]."""
    c0, c1, c2, c3 = latency[:4]
    seconds = c0 + c1 * prefill_tokens + c2 * decodes + c3 * context
    if len(latency) == 6:
        knee, c4 = latency[4:]
        seconds += c4 * max(prefill_tokens + decodes - knee, 0)
    return seconds


def result_of(
    status: str, usable_blocks: int, everyone: Sequence[Any], records: list[dict[str, Any]], time: float
) -> dict[str, Any]:
    """The result of a run of `everyone`, with the records of its iterations, that ended at `time`."""
    return {
        "status": status,
        "usable_blocks": usable_blocks,
        "per_request": {
            r.id: {
                "first_token_time": r.first_token_time,
                "finish_time": r.finish_time,
                "preemptions": r.preemptions,
                "emitted": r.generated,
                "first_sched_iter": r.first_sched_iter,
                "first_token_iter": r.first_token_iter,
                "finish_iter": r.finish_iter,
            }
            for r in everyone
        },
        "iterations": records,
        "summary": {
            "iterations": len(records),
            "preemptions": sum(r.preemptions for r in everyone),
            "end_time": time,
            "scheduled_entries": sum(len(record["sched"]) for record in records),
            "finished": sum(r.finish_time is not None for r in everyone),
        },
    }


def simulate(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine on `spec` = {"config": {...}, "requests": [...]} and returns the schedule-file dict.

    `spec["engine"]` is V1, if missing, V0 or orca. Missing config keys take `DEFAULT_CONFIG`, which is V1's: of V0 all
    are given. All requests have `arrival_time` (s) or all have `arrival_iteration`. The result has `status`,
    `usable_blocks`, `per_request` (ids are list positions as strings), `iterations` and `summary`. An iteration's
    record shows queues and blocks after scheduling, before finished requests leave (`used_blocks_end`: after).

    Where the written rules leave a choice: an unbroken run of empty iterations counts from its start, also the part
    before the last arrival; `max_iterations` limits executed iterations, and work that ends exactly at the limit is
    `ok`.
    """
    config = {**DEFAULT_CONFIG, **spec.get("config", {})}
    requests = spec["requests"]
    by_iteration = bool(requests) and "arrival_iteration" in requests[0]
    arrival_key = "arrival_iteration" if by_iteration else "arrival_time"
    everyone = [
        Request(str(i), entry[arrival_key], entry["prompt_len"], entry["output_len"])
        for i, entry in enumerate(requests)
    ]
    pending = deque(sorted(everyone, key=lambda request: request.arrival))  # a stable sort: ties stay in list order

    name = spec.get("engine", "V1")
    engine = ENGINES[name](config)
    records: list[dict[str, Any]] = []
    time, index, empty_in_a_row = 0.0, 0, 0
    status = "ok"
    while pending or engine.running or engine.waiting:
        if len(records) >= config["max_iterations"]:
            status = "max_iterations"
            break
        if not engine.running and not engine.waiting:
            if by_iteration:
                index = max(index, int(pending[0].arrival))
            else:
                time = max(time, pending[0].arrival)
        now = index if by_iteration else time
        added = []
        while pending and pending[0].arrival <= now:
            added.append(pending.popleft())
        engine.waiting.extend(added)

        entries, preempted = engine.schedule()
        decodes = sum(n == 1 and r.generated > 0 and r.computed == r.length - 1 for r, n in entries)
        prefill_tokens = sum(n for _, n in entries) - decodes  # a decode is one token
        context = sum(r.computed + n for r, n in entries)
        seconds = duration(config["latency"], prefill_tokens, decodes, context)
        record: dict[str, Any] = {
            "i": index,
            "t": time,
            "dur": seconds,
            "sched": {r.id: n for r, n in entries},
            "np": prefill_tokens,
            "nd": decodes,
            "ctx": context,
            "preempted": [r.id for r in preempted],
            "added": [r.id for r in added],
            "running": len(engine.running),
            "waiting": len(engine.waiting),
            "used_blocks": engine.usable_blocks - engine.free_blocks,
            "free_blocks": engine.free_blocks,
        }
        for request, _ in entries:
            if request.first_sched_iter is None:
                request.first_sched_iter = index
        time += seconds
        sampled, finished, leaving = engine.compute(entries)
        for request in sampled:
            if request.first_token_iter is None:
                request.first_token_iter, request.first_token_time = index, time
        for request in finished:
            request.finish_iter, request.finish_time = index, time
        for request in engine.ignored:
            request.ignored_iter = index
        if name == "V0":
            record["ignored"] = [r.id for r in engine.ignored]
        record["finished"] = [r.id for r in leaving]
        record["used_blocks_end"] = engine.usable_blocks - engine.free_blocks
        records.append(record)
        index += 1

        empty_in_a_row = 0 if entries else empty_in_a_row + 1
        if empty_in_a_row >= config["stall_iterations"] and not pending and (engine.running or engine.waiting):
            status = "stalled"
            break

    result = result_of(status, engine.usable_blocks, everyone, records, time)
    if isinstance(engine, EngineV0):
        result["watermark_blocks"] = engine.watermark
        result["summary"]["ignored"] = sum(r.ignored_iter is not None for r in everyone)
        for r in everyone:
            end = None if r.finish_time is None else "FINISHED_LENGTH_CAPPED"
            end = end if r.ignored_iter is None else "FINISHED_IGNORED"
            result["per_request"][r.id] |= {"ignored_iter": r.ignored_iter, "finish_reason": end}
    return result
