"""Plain Python reference of vLLM's V1 engine as it is deployed: with prefix caching and asynchronous scheduling.

It is written from the rules of `docs/simulation.md` section 1c alone, block by block: a free queue, a map from a
block's hash to its blocks, and a batch in flight. With both options off it is `tests.reference.engine`. It is checked
against recorded runs of vLLM 0.33.0's scheduler in `tests/test_reference.py`, and shares no code with `jaxroute`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference.engine import DEFAULT_CONFIG, duration, result_of

DEFAULTS: dict[str, Any] = {
    **DEFAULT_CONFIG,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "threshold_when_alone": True,  # false since vLLM 0.31: a request that is alone has no long-prefill threshold
    "unhashed_first": True,  # since vLLM 0.23: freed blocks without a hash enter the free queue at its front
}


@dataclass(eq=False)
class Block:
    """A KV block: how many requests hold it, and the hash of its content, if it is full and cached."""

    count: int = 0
    hash: int | None = None


class BlockPool:
    """All KV blocks. `free` are those that nobody holds, in the order in which they are taken."""

    def __init__(self, blocks: int, unhashed_first: bool):
        self.free: OrderedDict[Block, None] = OrderedDict((Block(), None) for _ in range(blocks))
        self.cached: dict[int, list[Block]] = {}  # the blocks of a hash in order of insertion
        self.unhashed_first = unhashed_first
        self.evicted = 0
        self.copies = 0  # blocks that got content while another block had the same

    def take(self, number: int) -> list[Block]:
        """Allocates (rule B6): blocks from the front, whose content is lost."""
        taken = [self.free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            block.count = 1
            if block.hash is not None:
                self.evicted += 1
                self.cached[block.hash].remove(block)
                if not self.cached[block.hash]:
                    del self.cached[block.hash]
                block.hash = None
        return taken

    def touch(self, block: Block) -> None:
        """A hit (rule B5)."""
        if block.count == 0:
            del self.free[block]
        block.count += 1

    def insert(self, block: Block, hash: int) -> None:
        block.hash = hash
        self.copies += hash in self.cached
        self.cached.setdefault(hash, []).append(block)

    def release(self, blocks: list[Block]) -> None:
        """Rule B8."""
        for block in reversed(blocks):
            block.count -= 1
            if block.count == 0:
                self.free[block] = None
                if block.hash is None and self.unhashed_first:
                    self.free.move_to_end(block, last=False)


@dataclass(eq=False)
class Request:
    """One request in the engine; lengths are in tokens, times in seconds."""

    id: str
    arrival: float
    prompt: int
    output: int
    most: int  # max_tokens, what the scheduler is told
    tokens: list[Any]  # of the prompt and the whole output: equal tokens are equal here
    generated: int = 0
    in_flight: int = 0  # sampled tokens that are not delivered yet (ph of rule C2)
    computed: int = 0
    blocks: list[Block] = field(default_factory=list)
    hashed: int = 0  # leading blocks of `blocks` that have a hash
    hashes: list[int] = field(default_factory=list)  # of its full blocks, as far as they were needed
    preemptions: int = 0
    first_sched_iter: int | None = None
    first_token_iter: int | None = None
    first_token_time: float | None = None
    finish_iter: int | None = None
    finish_time: float | None = None
    cached_first: int | None = None
    cached_total: int = 0
    computed_total: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.generated


def contents(requests: list[dict[str, Any]]) -> list[list[Any]]:
    """The tokens of each request, prompt and output: (segment, number), or (request, number) where it has none."""
    result = []
    for index, entry in enumerate(requests):
        segments = entry.get("segments", [[("prompt of", index), entry["prompt_len"]]])
        tokens = [(segment, k) for segment, count in segments for k in range(count)]
        assert len(tokens) == entry["prompt_len"]
        output = entry.get("output_segment", ("output of", index))
        result.append(tokens + [(output, k) for k in range(entry["output_len"])])
    return result


def prefixes(spec: dict[str, Any], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Prefix` of the requests of a spec in this order: owner and end, int [requests, pieces].

    The owner of a block is the first request that has it, and all before it, among its tokens.
    """
    size = spec["config"]["block_size"]
    tokens = contents(spec["requests"])
    owners: dict[Any, tuple[int, int]] = {}  # by the content of a block and the number of the one before: owner, number
    paths = []
    for request in order.tolist():
        path: dict[int, int] = {}
        before = -1
        for block in range(len(tokens[request]) // size):
            content = (before, tuple(tokens[request][block * size : (block + 1) * size]))
            owner, before = owners.setdefault(content, (request, len(owners)))
            path[owner] = (block + 1) * size
        paths.append(path)
    owner, end = np.zeros((2, len(paths), max(map(len, paths))), np.int32)
    for row, path in enumerate(paths):
        owner[row, : len(path)], end[row, : len(path)] = list(path), list(path.values())
    return owner, end


class Entry:
    """What an iteration does for one request; `samples` says whether it yields a token."""

    def __init__(self, request: Request, tokens: int):
        length = request.length + request.in_flight
        self.request, self.tokens = request, tokens
        self.decode = tokens == 1 and length > request.prompt and request.computed == length - 1
        self.context = request.computed + tokens
        self.samples = self.context >= length


class Engine:
    """vLLM's V1 scheduler with its KV cache manager."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.size, self.longest = config["block_size"], config["max_model_len"]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.usable_blocks = config["num_gpu_blocks"] - 1
        self.pool = BlockPool(self.usable_blocks, config["unhashed_first"])
        self.known: dict[Any, int] = {}  # the hash of (hash of the block before, tokens)

    @property
    def used_blocks(self) -> int:
        return self.usable_blocks - len(self.pool.free)

    def blocks_for(self, tokens: int) -> int:
        return -(-min(tokens, self.longest) // self.size)

    def hash_of(self, request: Request, number: int) -> int:
        """Rule B1."""
        while len(request.hashes) <= number:
            at = len(request.hashes)
            before = request.hashes[-1] if at else None
            key = (before, tuple(request.tokens[at * self.size : (at + 1) * self.size]))
            request.hashes.append(self.known.setdefault(key, len(self.known)))
        return request.hashes[number]

    def hits(self, request: Request) -> list[Block]:
        """Rule B2."""
        found: list[Block] = []
        if self.config["enable_prefix_caching"]:
            for number in range((request.length - 1) // self.size):
                same = self.pool.cached.get(self.hash_of(request, number))
                if not same:
                    break
                found.append(same[0])
        return found

    def hash_blocks(self, request: Request, tokens: int) -> None:
        """Rule B7: the full blocks of the first `tokens` tokens."""
        if self.config["enable_prefix_caching"]:
            full = tokens // self.size
            for number in range(request.hashed, full):
                self.pool.insert(request.blocks[number], self.hash_of(request, number))
            request.hashed = max(request.hashed, full)

    def add(self, request: Request, tokens: int) -> Entry:
        entry = Entry(request, tokens)
        request.computed += tokens
        request.computed_total += tokens
        self.hash_blocks(request, min(request.computed, request.length))  # rule C6: a token in flight is not known
        request.in_flight += entry.samples
        return entry

    def release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.hashed = [], 0

    def preempt_last(self) -> Request:
        victim = self.running.pop()
        self.release(victim)
        victim.computed = victim.in_flight = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def limit(self) -> int:
        """The long-prefill threshold of this iteration (rule A1)."""
        threshold = self.config["long_prefill_token_threshold"]
        alone = len(self.running) + len(self.waiting) <= 1
        return 2**30 if threshold == 0 or (alone and not self.config["threshold_when_alone"]) else threshold

    def ends_when_delivered(self, request: Request) -> bool:
        """Rule C3: the token in flight is known to be the last one."""
        return request.in_flight > 0 and (request.generated + 1 >= request.most or request.length + 1 >= self.longest)

    def schedule(self) -> tuple[list[Entry], list[Request], dict[str, int]]:
        """Decides one iteration: the entries in order, the preempted, and the cached tokens of the admitted."""
        config = self.config
        budget, limit = config["max_num_batched_tokens"], self.limit()
        entries: list[Entry] = []
        preempted: list[Request] = []
        cached: dict[str, int] = {}

        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            position += 1
            tokens = min(request.length + request.in_flight - request.computed, limit, budget)
            tokens = min(tokens, self.longest - 1 - request.computed)
            if tokens <= 0 or self.ends_when_delivered(request):
                continue
            need = self.blocks_for(request.computed + tokens) - len(request.blocks)
            while need > len(self.pool.free) and request in self.running:
                preempted.append(self.preempt_last())
            if request not in self.running:
                break
            request.blocks += self.pool.take(max(need, 0))
            entries.append(self.add(request, tokens))
            budget -= tokens

        while not preempted and self.waiting and budget > 0 and len(self.running) < config["max_num_seqs"]:
            request = self.waiting[0]
            hits = self.hits(request)
            hit = len(hits) * self.size
            tokens = min(request.length - hit, limit)
            if tokens > budget and not config["enable_chunked_prefill"]:
                break
            tokens = min(tokens, budget)
            spare = len(self.pool.free) + sum(block.count > 0 for block in hits)  # rule B4
            if config["reserve_full_isl"] and spare < self.blocks_for(request.length):
                break
            need = self.blocks_for(hit + tokens)
            if spare < need:
                break
            for block in hits:
                self.pool.touch(block)
            request.blocks = hits + self.pool.take(need - len(hits))
            request.hashed, request.computed = len(hits), hit
            self.running.append(self.waiting.popleft())
            cached[request.id] = hit
            entries.append(self.add(request, tokens))
            budget -= tokens
        return entries, preempted, cached

    def update(self, entries: list[Entry]) -> tuple[list[Request], list[Request]]:
        """Delivers the tokens of a batch. Returns the requests that got one, and those of them that are finished."""
        sampled = [e.request for e in entries if e.samples and e.request.finish_time is None]
        for request in sampled:
            request.in_flight = max(request.in_flight - 1, 0)
            request.generated += 1
            self.hash_blocks(request, request.computed - request.in_flight)
        finished = [r for r in sampled if r.generated >= r.output or r.length >= self.longest]
        for request in finished:
            self.release(request)
            (self.running if request in self.running else self.waiting).remove(request)
        return sampled, finished


@dataclass
class Batch:
    """A batch that was scheduled and is not updated yet."""

    entries: list[Entry]
    end: float
    record: dict[str, Any]


def simulate(spec: dict[str, Any]) -> dict[str, Any]:
    """As `tests.reference.engine.simulate`, for V1; the records have the further keys of the recorded runs of 0.33."""
    config = {**DEFAULTS, **spec.get("config", {})}
    requests = spec["requests"]
    by_iteration = "arrival_iteration" in requests[0]
    arrival_key = "arrival_iteration" if by_iteration else "arrival_time"
    everyone = [
        Request(str(i), entry[arrival_key], entry["prompt_len"], entry["output_len"], most, tokens)
        for i, (entry, tokens) in enumerate(zip(requests, contents(requests), strict=True))
        for most in [entry.get("max_tokens", entry["output_len"])]
    ]
    pending = deque(sorted(everyone, key=lambda request: request.arrival))
    engine, is_async = Engine(config), config["async_scheduling"]
    depth = 2 if is_async else 1
    batches: deque[Batch] = deque()  # scheduled and not updated; the first is being executed
    records: list[dict[str, Any]] = []
    time, index, empty_in_a_row, status = 0.0, 0, 0, "ok"
    while pending or engine.running or engine.waiting:
        if len(records) >= config["max_iterations"]:
            status = "max_iterations"
            break
        if not engine.running and not engine.waiting and not batches:
            if by_iteration:
                index = max(index, int(pending[0].arrival))
            else:
                time = max(time, pending[0].arrival)
        now = index if by_iteration else time
        added = []
        while pending and pending[0].arrival <= now:
            added.append(pending.popleft())
        engine.waiting.extend(added)

        entries: list[Entry] = []
        if engine.running or engine.waiting:  # else only a token that will be dropped is in flight
            evicted_before = engine.pool.evicted
            entries, preempted, cached = engine.schedule()
            decodes = sum(entry.decode for entry in entries)
            prefill_tokens = sum(entry.tokens for entry in entries) - decodes
            context = sum(entry.context for entry in entries)
            seconds = duration(config["latency"], prefill_tokens, decodes, context)
            if not entries and batches:
                seconds = 0.0  # rule C8
            start = batches[-1].end if entries and batches else time
            record = {
                "i": index,
                **({"ts": time} if is_async else {}),
                "t": start,
                "dur": seconds,
                "sched": {entry.request.id: entry.tokens for entry in entries},
                "cached": cached,
                "np": prefill_tokens,
                "nd": decodes,
                "ctx": context,
                "preempted": [r.id for r in preempted],
                "added": [r.id for r in added],
                "finished": [],
                "running": len(engine.running),
                "waiting": len(engine.waiting),
                "used_blocks": engine.used_blocks,
                "free_blocks": engine.usable_blocks - engine.used_blocks,
                "used_blocks_end": engine.used_blocks,
                "evicted": engine.pool.evicted - evicted_before,
                "cached_hashes": len(engine.pool.cached),
            }
            records.append(record)
            for entry in entries:
                if entry.request.first_sched_iter is None:
                    entry.request.first_sched_iter = index
            for request in (r for r in everyone if r.id in cached):
                if request.cached_first is None:
                    request.cached_first = cached[request.id]
                request.cached_total += cached[request.id]
            index += 1
            if entries:
                batches.append(Batch(entries, start + seconds, record))
                if len(batches) < depth:
                    empty_in_a_row = 0
                    continue
            elif not batches:
                time += seconds
        empty_in_a_row = 0 if entries or batches else empty_in_a_row + 1
        if batches:
            batch = batches.popleft()
            time = batch.end
            sampled, finished = engine.update(batch.entries)
            for request in sampled:
                if request.first_token_iter is None:
                    request.first_token_iter, request.first_token_time = batch.record["i"], time
            for request in finished:
                request.finish_iter, request.finish_time = batch.record["i"], time
            batch.record["finished"] = [r.id for r in finished]
            batch.record["used_blocks_end"] = engine.used_blocks
        if empty_in_a_row >= config["stall_iterations"] and not pending and (engine.running or engine.waiting):
            status = "stalled"
            break
    result = result_of(status, engine.usable_blocks, everyone, records, time)
    for request in everyone:
        result["per_request"][request.id] |= {
            "cached_first": request.cached_first,
            "cached_total": request.cached_total,
            "computed_total": request.computed_total,
        }
    result["summary"] |= {
        "computed_tokens": sum(r.computed_total for r in everyone),
        "cached_tokens": sum(r.cached_total for r in everyone),
    }
    return {**result, "copies": engine.pool.copies}
