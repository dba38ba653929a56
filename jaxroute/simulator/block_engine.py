"""vLLM's V1 scheduler with prefix caching, block by block, in plain Python: `replay` runs it if prefixes may be shared.

It follows simulation.md sections 1 and 1c in float64, for any prompts, and is exact also where the same content is in
several blocks. The engines in JAX (`scheduler`, `prefix_cache`) are for requests that share nothing. A block is a
number.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxroute.simulator.engine import LARGE, EngineParams

Segment = tuple[object, int]
"""An identity and a number of tokens. Token k of a segment is the same wherever the segment is."""


class BlockRequest:
    """A request; lengths are in tokens, times in s, iterations are counted from 0."""

    def __init__(self, arrival: float, prompt: int, output: int, most: int, content: Sequence[Segment]):
        self.arrival = arrival  # s, or an iteration
        self.prompt, self.output, self.most = prompt, output, most
        self.content = content  # of the prompt and of the whole output
        self.generated = self.in_flight = self.computed = 0
        self.blocks: list[int] = []
        self.hashed = 0  # number of leading blocks with content
        self.keys: list[int] = []  # what identifies the content of the full blocks, as far as it is known
        self.pieces: Iterator[tuple[object, ...]] | None = None
        self.preemptions = self.cached = 0
        self.first_token_time: float | None = None
        self.finish_time: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what was delivered of the output."""
        return self.prompt + self.generated


class Entry(NamedTuple):
    """A request in a batch."""

    request: BlockRequest
    tokens: int
    decodes: bool
    samples: bool


def pieces_of_blocks(content: Sequence[Segment], size: int) -> Iterator[tuple[object, ...]]:
    """The parts of segments (identity, first token, tokens) that each full block of `size` tokens consists of."""
    block: list[object] = []
    room = size
    for identity, tokens in content:
        start = 0
        while start < tokens:
            part = min(room, tokens - start)
            block.append((identity, start, part))
            start, room = start + part, room - part
            if room == 0:
                yield tuple(block)
                block, room = [], size


class BlockPool:
    """KV blocks and the content of those that are cached (rules B1 and B6 to B8)."""

    def __init__(self, number: int, unhashed_first: bool):
        self.holders = [0] * number
        self.content: list[int | None] = [None] * number
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(number))
        self.cached: dict[int, list[int]] = {}  # the blocks of a content in the order of their insertion
        self.unhashed_first = unhashed_first

    def allocate(self, number: int) -> list[int]:
        """Blocks from the front of the free queue, which lose their content (rule B6)."""
        taken = [self.free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            self.holders[block] = 1
            key, self.content[block] = self.content[block], None
            if key is not None:
                self.cached[key].remove(block)
                if not self.cached[key]:
                    del self.cached[key]
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """One more request holds `blocks` (rule B5)."""
        for block in blocks:
            if self.holders[block] == 0:
                del self.free[block]
            self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One request less holds `blocks` (rule B8)."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None
                if self.content[block] is None and self.unhashed_first:
                    self.free.move_to_end(block, last=False)

    def insert(self, block: int, key: int) -> None:
        """A block has content, also if another one has the same."""
        self.content[block] = key
        self.cached.setdefault(key, []).append(block)


class BlockEngine:
    """The queues of one engine; `options` are its options, each field []."""

    def __init__(self, options: EngineParams):
        self.size, self.longest = int(options.block_size), int(options.max_model_len)
        self.seats, self.budget = int(options.max_num_seqs), int(options.max_num_batched_tokens)
        self.threshold = int(options.long_prefill_token_threshold) or LARGE
        self.chunks, self.whole = bool(options.enable_chunked_prefill), bool(options.reserve_full_isl)
        self.caching, self.threshold_when_alone = options.enable_prefix_caching, options.threshold_when_alone
        self.pool = BlockPool(int(options.usable_blocks), options.unhashed_first)
        self.known: dict[object, int] = {}
        self.running: list[BlockRequest] = []
        self.waiting: deque[BlockRequest] = deque()

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _key(self, request: BlockRequest, number: int) -> int:
        """What identifies the content of a full block and of all before it (rule B1)."""
        if request.pieces is None:
            request.pieces = pieces_of_blocks(request.content, self.size)
        keys = request.keys
        while len(keys) <= number:
            own = (keys[-1] if keys else None, next(request.pieces))
            keys.append(self.known.setdefault(own, len(self.known)))
        return keys[number]

    def _find(self, request: BlockRequest) -> list[int]:
        """Rule B2."""
        found: list[int] = []
        if self.caching:
            for number in range((request.length - 1) // self.size):
                blocks = self.pool.cached.get(self._key(request, number))
                if blocks is None:
                    break
                found.append(blocks[0])
        return found

    def _hash(self, request: BlockRequest, tokens: int) -> None:
        """Rule B7: the blocks that the first `tokens` tokens fill."""
        full = tokens // self.size
        if self.caching and full > request.hashed:
            for number in range(request.hashed, full):
                self.pool.insert(request.blocks[number], self._key(request, number))
            request.hashed = full

    def _enter(self, request: BlockRequest, tokens: int) -> Entry:
        length = request.length + request.in_flight
        decodes = tokens == 1 and length > request.prompt and request.computed == length - 1
        request.computed += tokens
        self._hash(request, min(request.computed, request.length))  # rule C6
        samples = request.computed >= length
        request.in_flight += samples
        return Entry(request, tokens, decodes, samples)

    def _release(self, request: BlockRequest) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.hashed = [], 0

    def _preempt_last(self) -> BlockRequest:
        victim = self.running.pop()
        self._release(victim)
        victim.computed = victim.in_flight = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    def schedule(self) -> list[Entry]:
        """The entries of the next batch, in order."""
        alone = len(self.running) + len(self.waiting) <= 1
        limit = LARGE if alone and not self.threshold_when_alone else self.threshold
        entries: list[Entry] = []
        preempted = self._continue(entries, limit)
        budget = self.budget - sum(entry.tokens for entry in entries)
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seats:
            request = self.waiting[0]
            found = self._find(request)
            cached = len(found) * self.size
            tokens = min(request.length - cached, limit)
            if tokens > budget and not self.chunks:
                break
            tokens = min(tokens, budget)
            needed = self._blocks_for(cached + tokens)
            spare = len(self.pool.free) + sum(self.pool.holders[block] > 0 for block in found)  # rule B4
            if spare < max(needed, self._blocks_for(request.length) if self.whole else 0):
                break
            self.pool.hold(found)
            request.blocks = found + self.pool.allocate(needed - len(found))
            request.hashed, request.computed = len(found), cached
            request.cached += cached
            self.running.append(self.waiting.popleft())
            entries.append(self._enter(request, tokens))
            budget -= tokens
        return entries

    def _continue(self, entries: list[Entry], limit: int) -> bool:
        """Appends the entries of the running requests (rules 2 and 3); whether anyone was preempted."""
        preempted, position, budget = False, 0, self.budget
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            position += 1
            length = request.length + request.in_flight
            ends = request.in_flight and (length >= request.prompt + request.most or length >= self.longest)  # rule C3
            tokens = min(length - request.computed, limit, budget, self.longest - 1 - request.computed)
            if tokens <= 0 or ends:
                continue
            need = self._blocks_for(request.computed + tokens) - len(request.blocks)
            while need > len(self.pool.free):
                preempted = True
                if self._preempt_last() is request:
                    return True
            request.blocks += self.pool.allocate(max(need, 0))
            entries.append(self._enter(request, tokens))
            budget -= tokens
        return preempted

    def deliver(self, batch: Sequence[Entry], now: float) -> None:
        """The tokens of a batch that ends `now`, and the end of requests with their last one."""
        for request, _, _, samples in batch:
            if not samples or request.finish_time is not None:
                continue
            request.in_flight = max(request.in_flight - 1, 0)
            request.generated += 1
            self._hash(request, request.computed - request.in_flight)
            if request.first_token_time is None:
                request.first_token_time = now
            if request.generated >= request.output or request.length >= self.longest:
                request.finish_time = now
                self._release(request)
                (self.running if request in self.running else self.waiting).remove(request)


class BlockRun(NamedTuple):
    """How a run ended; the requests have their results."""

    status: str  # ok, stalled or max_iterations
    iterations: int
    end: float  # s, since time 0


def run_block_engine(
    options: EngineParams,
    requests: Sequence[BlockRequest],
    by_iteration: bool,
    max_iterations: int,
    stall_iterations: int,
) -> BlockRun:
    """Runs `requests`, which are in order of arrival; the other arguments are those of `recorded.Recording`."""
    engine, pending = BlockEngine(options), deque(requests)
    latency = [float(coefficient) for coefficient in vars(options.latency).values()]
    depth = 2 if options.async_scheduling else 1
    flights: deque[tuple[list[Entry], float]] = deque()  # batches and when they end; the first is being executed
    now, iteration, executed, idle = 0.0, 0, 0, 0
    while pending or engine.running or engine.waiting:
        if executed >= max_iterations:
            return BlockRun("max_iterations", executed, now)
        if not (engine.running or engine.waiting or flights):
            if by_iteration:
                iteration = max(iteration, int(pending[0].arrival))
            else:
                now = max(now, pending[0].arrival)
        while pending and pending[0].arrival <= (iteration if by_iteration else now):
            engine.waiting.append(pending.popleft())
        entries: list[Entry] = []
        if engine.running or engine.waiting:
            entries = engine.schedule()
            iteration, executed = iteration + 1, executed + 1
            if entries:
                idle = 0
                flights.append((entries, (flights[-1][1] if flights else now) + _duration(latency, entries)))
                if len(flights) < depth:
                    continue
            elif not flights:  # rule C8
                now += latency[0]
        idle = 0 if entries or flights else idle + 1
        if flights:
            batch, now = flights.popleft()
            engine.deliver(batch, now)
        if idle >= stall_iterations and not pending and (engine.running or engine.waiting):
            return BlockRun("stalled", executed, now)
    return BlockRun("ok", executed, now)


def _duration(latency: Sequence[float], entries: Sequence[Entry]) -> float:
    """Seconds of a batch that has just been scheduled (`latency.iteration_time`)."""
    base, per_prefill, per_decode, per_context, knee, above = latency
    decodes = sum(entry.decodes for entry in entries)
    prefill = sum(entry.tokens for entry in entries) - decodes
    context = sum(entry.request.computed for entry in entries)
    over = max(prefill + decodes - knee, 0.0)
    return base + per_prefill * prefill + per_decode * decodes + per_context * context + above * over
