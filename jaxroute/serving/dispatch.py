"""Requests from decision to end: the one place where the ledger, the predictions and the statistics change.

It knows nothing of HTTP: the front end and the sidecar both route by it.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxroute.serving.call import Call, Outcome
from jaxroute.serving.cluster import Cluster, as_seen
from jaxroute.serving.decision import Asked, Decider
from jaxroute.serving.ledger import Ledger
from jaxroute.serving.openai import Completion, Limit, Refused
from jaxroute.serving.predictions import Predictions
from jaxroute.serving.statistics import Statistics
from jaxroute.simulator.engine import EngineParams

RECENT_DELAYS = 20
"""First tokens at idle engines over which the delay of an expert is averaged, about."""


class Dispatcher:
    """Sends requests to experts by a router, and keeps what is known of them.

    Every call of `begin` that returns is followed by exactly one of `end`.
    """

    def __init__(
        self,
        cluster: Cluster,
        decider: Decider,
        predictions: Predictions,
        limit: Limit,
        statistics: Statistics,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limit` is that of requests without one of their own."""
        self.cluster, self.decider, self.predictions, self.limit = cluster, decider, predictions, limit
        self.statistics, self.clock = statistics, clock
        self.ledger = Ledger(len(cluster.experts), decider.env.slots, np.zeros(len(cluster.experts)))
        self._know(decider.params.engines)
        self._delays = np.zeros(len(cluster.experts), int)  # times that were taken
        self.up = np.ones(len(cluster.experts), bool)
        self.last_progress = np.full(len(cluster.experts), self.clock())

    def warm_up(self) -> None:
        """Compiles the program of a decision, so that no request waits for it."""
        count = len(self.cluster.experts)
        wanted = Asked(1, np.ones(count, np.int32), np.ones(count, np.float32), 1.0)
        self.decider(self.ledger, self.clock(), wanted, self.up)

    def call(self, asked: Completion) -> Call:
        """A request that has just arrived."""
        now, started = self.clock(), time.perf_counter()
        self.ledger.arrive(now)
        self.statistics.arrived()
        scores, lengths = self.predictions(asked)
        # What is too long for every expert is for a server to refuse, since the length is an estimate.
        prompt = min(self.predictions.prompt_tokens(asked), self._longest_prompt)
        limit, work = asked.limit or self.limit, time.perf_counter() - started
        return Call(asked, now, limit, scores, lengths, prompt, work)

    def begin(self, call: Call, without: int | None = None) -> int:
        """Decides and reserves a slot, in one go: the number of the expert. Raises `Refused` for a dropped request.

        `without` is an expert that has just failed the request.
        """
        now, up = self.clock(), self.up.copy()
        if without is not None:
            up[without] = False
        if not up.any():
            self.statistics.dropped(call, "no expert is up")
            raise Refused(503, "No expert is up; try again later.", "server_error", "no_expert", **{"Retry-After": "5"})
        wanted = Asked(
            call.prompt_estimate,
            call.predicted_lengths,
            call.predicted_scores,
            call.limit.of(float(call.predicted_lengths.mean())),
        )
        started = time.perf_counter()
        decision = self.decider(self.ledger, now, wanted, up)
        call.work += time.perf_counter() - started
        self.statistics.decided(call.work)
        if decision.expert is None:
            full = (self.ledger.count[up] >= self.ledger.slots).all()
            reason = "all queues are full" if full else "the router dropped it"
            self.statistics.dropped(call, reason)
            raise Refused(
                429,
                f"The request was dropped: {reason}, as no expert is likely to answer within its limit of latency.",
                "rate_limit_error",
                "dropped",
                **{"Retry-After": str(decision.retry_after)},
            )
        expert = decision.expert
        call.sent = now
        most = max(int(self._model_len[expert]) - call.prompt_estimate, 1)
        call.ticket = self.ledger.send(
            expert,
            now,
            call.prompt_estimate,
            int(call.predicted_lengths[expert]),
            float(call.predicted_scores[expert]),
            min(most, call.asked.most_tokens or most),
        )
        call.alone = self.ledger.count[expert] == 1
        if call.alone:
            self.last_progress[expert] = now
        self.statistics.sent(expert)
        return expert

    def progress(self, call: Call, tokens: int, prompt_tokens: int | None) -> None:
        """Notes that the answer has `tokens` up to now, and how long the prompt is, once the server has said it."""
        assert call.ticket is not None
        now = self.clock()
        self.last_progress[call.ticket.expert] = now
        if tokens > call.tokens:
            call.tokens = tokens
            if call.first_token is None:
                call.first_token = now
                if call.alone and prompt_tokens:
                    self._learn_delay(call.ticket.expert, now - call.sent, prompt_tokens)
        if prompt_tokens is not None and call.prompt_tokens is None:
            call.prompt_tokens = prompt_tokens
        self.ledger.progress(call.ticket, now, call.tokens, prompt_tokens)

    def end(self, call: Call, outcome: Outcome) -> None:
        """Frees the slot."""
        assert call.ticket is not None
        now, expert = self.clock(), call.ticket.expert
        self.ledger.end(call.ticket, now, completed=outcome == "completed")
        self.last_progress[expert] = now
        call.ticket = None
        first = now if call.first_token is None else call.first_token
        met = outcome == "completed" and call.limit.is_met(first - call.arrival, now - call.arrival, call.tokens)
        if outcome == "completed":
            self.predictions.learn(expert, call.asked, call.prompt_tokens, max(call.tokens, 1))
        self.statistics.ended(expert, outcome, call, first, now, met)
        if outcome == "failed":  # what comes next is another try
            call.first_token, call.tokens = None, 0

    def _learn_delay(self, expert: int, seconds: float, prompt: int) -> None:
        """Takes the time to the first token at an idle engine, which is one iteration and the way there and back."""
        c0, c1, _, c3, knee, c4 = self._latency[:, expert]
        if prompt > self._budget[expert]:  # several iterations
            return
        rest = seconds - (c0 + (c1 + c3) * prompt + c4 * max(prompt - knee, 0.0))
        self._delays[expert] += 1
        known = self.ledger.delay
        known[expert] += (np.clip(rest, 0.0, c0) - known[expert]) / min(self._delays[expert], RECENT_DELAYS)

    def use_engine(self, expert: int, engine: EngineParams) -> None:
        """Replaces the engine of an expert, each field [], once it has been measured."""
        params, engine = self.decider.params, as_seen(engine)
        engines = jax.tree.map(lambda all_of_them, own: all_of_them.at[expert].set(own), params.engines, engine)
        self.decider.params = params.replace(engines=engines)
        self._know(engines)
        self._delays[expert] = 0
        self.statistics.measured(expert, engines)

    def _know(self, engines: EngineParams) -> None:
        """Takes what is needed on the host from the engines."""
        self.ledger.shortest_iteration = np.array(engines.latency.base, float)
        self._latency = np.array(jax.tree.leaves(engines.latency), float)  # in the order of its fields
        self._budget = np.asarray(engines.max_num_batched_tokens)
        longest = np.minimum(engines.max_model_len - 1, engines.usable_blocks * engines.block_size)
        self._longest_prompt, self._model_len = int(longest.max()), np.asarray(engines.max_model_len)
