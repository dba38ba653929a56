"""Plain Python reference of the routing environment: several reference engines behind a router, one arrival at a time.

Written from simulation.md sections 1 and 4 (accounting of an episode, rejection at routing, "every iteration that
starts before an arrival does not see it"), with absolute times; the rules of an engine are those of `engine.py`. It
shares no code with `jaxroute`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from tests.reference import caching
from tests.reference import engine as reference


@dataclass
class Arrival:
    """A request as the N experts would serve it: true output tokens and score for each."""

    prompt: int
    output: list[int]
    score: list[float]
    pieces: list[tuple[int, int]] | None = None  # (owner, end): of whom its tokens are, up to where


@dataclass
class Worth:
    """When an answer is in time, and what it costs."""

    limit: float  # latency limit, seconds per output token
    ttft: float | None = None  # seconds; with the next, instead of the latency limit
    tpot: float | None = None  # seconds
    price: list[float] | None = None  # of 1,000 output tokens, by expert
    patience: float = math.inf  # seconds until a client gives up


@dataclass
class Fate:
    """What became of a request. Times in seconds; timings are None unless it completed."""

    arrival: float
    expert: int | None  # None: dropped
    status: str  # open, completed, dropped, rejected_full, rejected_infeasible, abandoned
    score: float
    worth: Worth
    served: reference.Request | None = None

    @property
    def latency_per_token(self) -> float | None:
        if self.served is None or self.served.finish_time is None:
            return None
        return (self.served.finish_time - self.arrival) / self.served.generated

    @property
    def ttft(self) -> float | None:
        if self.served is None or self.served.first_token_time is None:
            return None
        return self.served.first_token_time - self.arrival

    @property
    def tpot(self) -> float | None:
        served = self.served
        if served is None or served.finish_time is None or served.first_token_time is None or served.generated < 2:
            return None
        return (served.finish_time - served.first_token_time) / (served.generated - 1)

    @property
    def violated(self) -> bool:
        latency, ttft, tpot = self.latency_per_token, self.ttft, self.tpot
        if latency is None or ttft is None:
            return False
        if self.worth.ttft is not None and self.worth.tpot is not None:
            return ttft >= self.worth.ttft or (tpot is not None and tpot >= self.worth.tpot)
        return latency >= self.worth.limit

    @property
    def cost(self) -> float:
        if self.status != "completed" or self.worth.price is None:
            return 0.0
        assert self.served is not None and self.expert is not None
        return self.worth.price[self.expert] * self.served.generated / 1000

    @property
    def qos(self) -> float:
        return (self.score if self.status == "completed" and not self.violated else 0.0) - self.cost


class Expert:
    """One engine with a clock, and what it did so far."""

    def __init__(self, config: dict[str, Any], engine: str = "V1", patience: float = math.inf):
        self.config = {**reference.DEFAULT_CONFIG, **config}
        self.patience = patience
        self.gone: list[Any] = []  # requests whose clients gave up
        self.engine = reference.ENGINES[engine](self.config)
        self.clock = 0.0  # start of the next iteration, unless idle
        self.busy = 0.0
        self.block_seconds = 0.0
        self.preemptions = 0
        self.ignored: list[reference.Request] = []
        self.margin = math.inf  # the closest that the start of an iteration came to an arrival, seconds

    def _note_times(self, sampled: list[Any], finished: list[Any]) -> None:
        for request in sampled:
            if request.first_token_time is None:
                request.first_token_time = self.clock
        for request in finished:
            request.finish_time = self.clock

    def cancel(self, at: float) -> None:
        """The clients that have waited too long at this time give up."""
        for queue in (self.engine.running, self.engine.waiting):
            for request in list(queue):
                self.margin = min(self.margin, abs(request.arrival + self.patience - at))
                if request.arrival + self.patience <= at:
                    queue.remove(request)
                    self.engine.release(request)
                    request.finish_time = math.inf
                    self.gone.append(request)

    def queue_length(self) -> int:
        return len(self.engine.running) + len(self.engine.waiting)

    def can_serve(self, prompt: int, output: int) -> bool:
        """Rule 8: whether the request could ever finish here; the front end also wants room for one token. Under V0,
        whether its prompt would not be ignored at once; under Orca, whether there is a place at all.
        """
        model_len, budget = self.config["max_model_len"], self.config["max_num_batched_tokens"]
        if prompt >= model_len:
            return False
        if isinstance(self.engine, reference.EngineV0):
            return prompt <= budget and self.engine.blocks_for(prompt) + self.engine.watermark <= (
                self.engine.usable_blocks
            )
        if isinstance(self.engine, reference.EngineOrca):
            return self.engine.blocks_for(model_len) <= self.engine.usable_blocks
        if not self.config["enable_chunked_prefill"] and prompt + output - 1 > budget:
            return False
        return self.engine.blocks_for(min(prompt + output, model_len) - 1) <= self.engine.usable_blocks

    def new_request(self, number: int, now: float, prompt: int, output: int, pieces: Any = None) -> reference.Request:
        assert pieces is None
        return reference.Request(str(number), now, prompt, output)

    def join(self, request: reference.Request, now: float) -> None:
        if self.queue_length() == 0:
            self.clock = max(self.clock, now)
        self.engine.waiting.append(request)

    def run_until(self, until: float) -> list[reference.Request]:
        """Every iteration that starts before `until`; the requests that leave in them, finished."""
        done = []
        while self.queue_length():
            self.margin = min(self.margin, abs(self.clock - until))
            self.cancel(min(self.clock, until))
            if self.clock >= until or not self.queue_length():
                break
            entries, preempted = self.engine.schedule()
            self.ignored += self.engine.ignored
            is_v0 = isinstance(self.engine, reference.EngineV0)  # which never stalls
            assert entries or preempted or is_v0, "the engine is stalled"
            decodes = sum(n == 1 and r.generated > 0 and r.computed == r.length - 1 for r, n in entries)
            prefill = sum(n for _, n in entries) - decodes
            context = sum(r.computed + n for r, n in entries)
            seconds = reference.duration(self.config["latency"], prefill, decodes, context)
            self.preemptions += len(preempted)
            self.busy += seconds
            self.block_seconds += seconds * (self.engine.usable_blocks - self.engine.free_blocks)
            self.clock += seconds
            sampled, finished, leaving = self.engine.compute(entries)
            self._note_times(sampled, finished)
            done += leaving
        return done


class ExpertToday(Expert):
    """One V1 engine with prefix caching, asynchronous scheduling or both; its requests end by stop tokens."""

    def __init__(self, config: dict[str, Any], patience: float = math.inf):
        super().__init__(config, patience=patience)
        self.config = {**caching.DEFAULTS, **config}
        self.engine = caching.Engine(self.config)
        self.flights: deque[tuple[list[caching.Entry], float]] = deque()  # batches and their ends; clock is now

    def new_request(self, number: int, now: float, prompt: int, output: int, pieces: Any = None) -> Any:
        if pieces is not None:
            tokens = [(next(o for o, end in pieces if k < end), k) for k in range(prompt + output)]
            return caching.Request(str(number), now, prompt, output, 10**9, tokens)
        lengths = {"prompt_len": prompt, "output_len": output, "output_segment": f"output of {number}"}
        (tokens,) = caching.contents([{**lengths, "segments": [[f"prompt of {number}", prompt]]}])
        return caching.Request(str(number), now, prompt, output, 10**9, tokens)

    def join(self, request: Any, now: float) -> None:
        if self.queue_length() == 0 and now > self.clock:
            for _, end in self.flights:  # a batch of which nothing is left ends first
                self.clock = end
            self.flights.clear()
            self.clock = max(self.clock, now)
        self.engine.waiting.append(request)

    def run_until(self, until: float) -> list[Any]:
        done, depth = [], 2 if self.config["async_scheduling"] else 1
        while self.queue_length():
            self.margin = min(self.margin, abs(self.clock - until))
            self.cancel(min(self.clock, until))
            if self.clock >= until or not self.queue_length():
                break
            entries, preempted, _ = self.engine.schedule()
            assert entries or preempted or self.flights, "the engine is stalled"
            decodes = sum(entry.decode for entry in entries)
            prefill = sum(entry.tokens for entry in entries) - decodes
            context = sum(entry.context for entry in entries)
            seconds = reference.duration(self.config["latency"], prefill, decodes, context)
            if not entries and self.flights:
                seconds = 0.0
            self.preemptions += len(preempted)
            self.busy += seconds
            self.block_seconds += seconds * self.engine.used_blocks
            if entries:
                self.flights.append((entries, (self.flights[-1][1] if self.flights else self.clock) + seconds))
                if len(self.flights) < depth:
                    continue
            elif not self.flights:
                self.clock += seconds
            if self.flights:
                batch, self.clock = self.flights.popleft()
                sampled, finished = self.engine.update(batch)
                self._note_times(sampled, finished)
                done += finished
        return done


class Cluster:
    """N experts with at most `slots` requests each in the system, and every request's fate in order of arrival."""

    def __init__(self, configs: list[dict[str, Any]], slots: int, worth: Worth, engine: str = "V1"):
        today, patience = "enable_prefix_caching" in configs[0], worth.patience
        self.experts = [
            ExpertToday(config, patience) if today else Expert(config, engine, patience) for config in configs
        ]
        self.slots = slots
        self.worth = worth
        self.now = 0.0
        self.fates: list[Fate] = []

    def step(self, request: Arrival, action: int, gap: float) -> float:
        """Routes the request that arrives now, runs to the next arrival; the QoS credited on the way."""
        self._route(request, action)
        self.now += gap
        return self._run_until(self.now)

    def drain(self) -> float:
        """Runs what is open to its end; the QoS of it."""
        return self._run_until(math.inf)

    def _route(self, request: Arrival, action: int) -> None:
        if action == len(self.experts):
            self.fates.append(Fate(self.now, None, "dropped", 0.0, self.worth))
            return
        expert, output = self.experts[action], request.output[action]
        fate = Fate(self.now, action, "open", request.score[action], self.worth)
        if not expert.can_serve(request.prompt, output):
            fate.status = "rejected_infeasible"
        elif expert.queue_length() >= self.slots:
            fate.status = "rejected_full"
        else:
            fate.served = expert.new_request(len(self.fates), self.now, request.prompt, output, request.pieces)
            expert.join(fate.served, self.now)
        self.fates.append(fate)

    def _run_until(self, until: float) -> float:
        qos = 0.0
        for expert in self.experts:
            for request in expert.run_until(until):
                fate = self.fates[int(request.id)]
                in_time = request.finish_time <= request.arrival + self.worth.patience
                fate.status = "completed" if in_time else "abandoned"
                qos += fate.qos
            for request in expert.gone:
                self.fates[int(request.id)].status = "abandoned"
            for request in expert.ignored:
                self.fates[int(request.id)].status = "rejected_infeasible"
        return qos

    def elapsed(self) -> float:
        """Seconds since the first arrival: to the last one, or to the end of the last iteration where that is later."""
        return max([self.now, *(expert.clock for expert in self.experts)])

    def count(self, status: str, expert: int | None = None) -> int:
        """Requests of this status, of one expert or of all."""
        return sum(fate.status == status and expert in (None, fate.expert) for fate in self.fates)
