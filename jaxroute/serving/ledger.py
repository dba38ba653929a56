"""The ledger: what was sent to each server and what came back, as arrays of fixed shape. No network code.

A front end sees when a request was sent and when each of its tokens came, and no more of a server. The ledger keeps
these facts; `estimate` makes the state of a simulated engine from them. Requests stand in the order in which they were
sent, which is also the order of vLLM's queues: running requests, then waiting ones (`simulator.engine`).

All times are seconds on one monotonic clock, which the caller reads.
"""

from typing import Any, NamedTuple

import numpy as np
from flax import struct

from jaxroute.environment.state import RECENT_COMPLETIONS, RECENT_GAPS

TURNS = 1 << 20
"""Decisions are counted modulo this number of rounds over the experts, so that int32 never overflows."""


class Ticket(NamedTuple):
    """An open request of the ledger."""

    expert: int
    number: int  # ascending over all requests


Leaf = Any
"""A NumPy array on the host, traced inside of a program."""


class Facts(struct.PyTreeNode):
    """The ledger at an instant, arrays for N experts with S slots; times are s relative to the instant."""

    count: Leaf  # int32 [N], open requests
    prompt_tokens: Leaf  # int32 [N, S], as are the following four; slots from `count` on mean nothing
    most_tokens: Leaf  # output tokens at which the request ends at the latest
    generated: Leaf  # tokens that have come
    predicted_tokens: Leaf
    behind: Leaf  # rounds of the expert's tokens since the last one of the request
    index: Leaf  # int32 [N, S], number of the request, modulo 2**31
    sent: Leaf  # float32 [N, S], <= 0
    predicted_score: Leaf  # float32 [N, S]
    round_start: Leaf  # float32 [N], <= 0, when the present round of tokens came, less the delay
    complete: Leaf  # bool [N], the round is so old that all of its tokens have come
    step: Leaf  # int32 [], decisions before this one
    recent_gap: Leaf  # float32 [], s
    recent_latency: Leaf  # float32 [N], s per token


class Ledger:
    """Open requests of N experts with at most S each. Every method takes time proportional to S at most."""

    def __init__(self, num_experts: int, slots: int, shortest_iteration: np.ndarray):
        """`shortest_iteration`, float [N], is the least time of an iteration of each expert, s: its latency's base."""
        shape = (num_experts, slots)
        self.slots = slots
        self.shortest_iteration = shortest_iteration
        self.delay = np.zeros(num_experts)  # s on the way to each expert and back, which tokens come late
        self.count = np.zeros(num_experts, np.int32)
        self._number = np.zeros(shape, np.int64)
        self._prompt_tokens = np.zeros(shape, np.int32)
        self._most_tokens = np.zeros(shape, np.int32)
        self._generated = np.zeros(shape, np.int32)
        self._predicted_tokens = np.zeros(shape, np.int32)
        self._last_round = np.zeros(shape, np.int64)
        self._sent = np.zeros(shape)
        self._predicted_score = np.zeros(shape, np.float32)
        self._columns = (
            self._number,
            self._prompt_tokens,
            self._most_tokens,
            self._generated,
            self._predicted_tokens,
            self._last_round,
            self._sent,
            self._predicted_score,
        )
        # A round are the tokens of one iteration, which come at nearly the same time.
        self._round = np.zeros(num_experts, np.int64)
        self._round_start = np.zeros(num_experts)
        self._next_number = 0
        self._decisions = 0
        self._last_arrival: float | None = None
        self._recent_gap = 0.0
        self._recent_latency = np.zeros(num_experts, np.float32)
        self._completed = np.zeros(num_experts, np.int64)  # since the last arrival
        self._latencies = np.zeros(num_experts)  # their sum, s per token

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.count)

    @property
    def open(self) -> int:
        """Open requests of all experts."""
        return int(self.count.sum())

    def arrive(self, now: float) -> None:
        """Notes that a request is about to be decided on, whatever the decision will be."""
        if self._last_arrival is not None:
            self._decisions += 1
            gap = max(now - self._last_arrival, 0.0)
            self._recent_gap += (gap - self._recent_gap) / min(self._decisions, RECENT_GAPS)
        self._last_arrival = now
        if not self._completed.any():
            return
        some, old = self._completed > 0, self._recent_latency
        mean = self._latencies / np.maximum(self._completed, 1)
        kept = np.where(old > 0, (1 - 1 / RECENT_COMPLETIONS) ** self._completed, ~some)
        self._recent_latency = (kept * old + (1 - kept) * mean).astype(np.float32)
        self._completed[:], self._latencies[:] = 0, 0

    def send(
        self,
        expert: int,
        now: float,
        prompt_tokens: int,
        predicted_tokens: int,
        predicted_score: float,
        most_tokens: int,
    ) -> Ticket:
        """Reserves a slot for a request that is sent to `expert`, which must have a free one. Tokens are 1 or more."""
        place = int(self.count[expert])
        if place == self.slots:
            raise ValueError(f"expert {expert} has no free slot")
        if place == 0:  # an idle engine begins an iteration at once
            self._begin_round(expert, now)
        number = self._next_number
        values = (number, prompt_tokens, most_tokens, 0, predicted_tokens, -1, now, predicted_score)
        for column, value in zip(self._columns, values, strict=True):
            column[expert, place] = value
        self._next_number += 1
        self.count[expert] += 1
        return Ticket(expert, number)

    def progress(self, ticket: Ticket, now: float, generated: int, prompt_tokens: int | None = None) -> None:
        """Notes that the request has `generated` tokens up to now, and the length of its prompt once it is known."""
        expert, place = ticket.expert, self._place(ticket)
        if prompt_tokens is not None:
            self._prompt_tokens[expert, place] = max(prompt_tokens, 1)
        if generated <= self._generated[expert, place]:
            return
        present = self._last_round[expert, place] == self._round[expert]
        if present or self._is_complete(expert, now):
            self._begin_round(expert, max(now - self.delay[expert], self._round_start[expert]))
        self._generated[expert, place] = generated
        self._last_round[expert, place] = self._round[expert]

    def end(self, ticket: Ticket, now: float, completed: bool) -> None:
        """Frees the slot of a request: it is `completed`, or it failed or was cancelled. A ticket ends once."""
        expert, place = ticket.expert, self._place(ticket)
        if completed:
            tokens = max(int(self._generated[expert, place]), 1)
            self._completed[expert] += 1
            self._latencies[expert] += max(now - self._sent[expert, place], 0.0) / tokens
        last = int(self.count[expert]) - 1
        for column in self._columns:
            column[expert, place:last] = column[expert, place + 1 : last + 1]
        self.count[expert] = last

    def is_open(self, ticket: Ticket) -> bool:
        """Whether the request has not ended."""
        place = self._find(ticket)
        return place < self.count[ticket.expert] and self._number[ticket.expert, place] == ticket.number

    def generated(self, ticket: Ticket) -> int:
        """Tokens of an open request that have come."""
        return int(self._generated[ticket.expert, self._place(ticket)])

    def facts(self, now: float) -> Facts:
        """All that is known at `now`, which is not before any time that was noted. The arrays are copies."""
        return Facts(
            count=self.count.copy(),
            prompt_tokens=self._prompt_tokens.copy(),
            most_tokens=self._most_tokens.copy(),
            generated=self._generated.copy(),
            predicted_tokens=self._predicted_tokens.copy(),
            behind=np.clip(self._round[:, None] - self._last_round, 0, 2).astype(np.int32),
            index=(self._number & 0x7FFFFFFF).astype(np.int32),
            sent=(self._sent - now).astype(np.float32),
            predicted_score=self._predicted_score.copy(),
            round_start=(self._round_start - now).astype(np.float32),
            complete=np.array([self._is_complete(expert, now) for expert in range(self.num_experts)]),
            step=np.int32(self._decisions % (self.num_experts * TURNS)),
            recent_gap=np.float32(self._recent_gap),
            recent_latency=self._recent_latency.copy(),
        )

    def _begin_round(self, expert: int, now: float) -> None:
        self._round[expert] += 1
        self._round_start[expert] = now

    def _is_complete(self, expert: int, now: float) -> bool:
        """Whether a token that comes now is of another iteration than those of the present round."""
        since = now - self.delay[expert] - self._round_start[expert]
        return bool(since > self.shortest_iteration[expert] / 2)

    def _find(self, ticket: Ticket) -> int:
        numbers = self._number[ticket.expert, : self.count[ticket.expert]]
        return int(np.searchsorted(numbers, ticket.number))

    def _place(self, ticket: Ticket) -> int:
        place = self._find(ticket)
        if place == self.count[ticket.expert] or self._number[ticket.expert, place] != ticket.number:
            raise ValueError(f"{ticket} is not open")
        return place
