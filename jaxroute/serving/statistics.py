"""What is counted, for Prometheus and for the status page; every request goes to the log too, if there is one."""

import collections
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jaxroute.serving.call import Call
from jaxroute.serving.log import Log
from jaxroute.simulator.engine import EngineParams

PERIOD = 5.0
"""Seconds of a bar on the status page."""

BARS = 120

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_PER_TOKEN = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5)
_DECISION = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Statistics:
    """Counts requests of N experts. Times are on the monotonic clock."""

    def __init__(self, names: Sequence[str], log: Log | None = None):
        """`log` gets a line for each request, and is closed with this."""
        self.registry = CollectorRegistry()
        self._names, self.log = list(names), log

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"jaxroute_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"jaxroute_{name}", text, labels, buckets=buckets, registry=self.registry)

        self._arrived = counter("requests", "Requests for completions that were understood.")
        self._sent = counter("sent", "Requests sent to an expert, other tries included.", "expert")
        self._ended = counter("ended", "Requests that ended at an expert.", "expert", "outcome")
        self._dropped = counter("dropped", "Requests that no expert got.", "reason")
        self._met = counter("met", "Completed requests within their limit of latency.", "expert")
        self._tokens = counter("completion_tokens", "Tokens of answers.", "expert")
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to first token.", _SECONDS, "expert")
        self._latency = histogram(
            "time_per_token_seconds", "From arrival to end, by output tokens.", _PER_TOKEN, "expert"
        )
        self._decision = histogram("decision_seconds", "Time of a prediction and the decision on it.", _DECISION)
        self._open = Gauge("jaxroute_open", "Open requests.", ["expert"], registry=self.registry)
        self._up = Gauge("jaxroute_up", "Whether the expert is up.", ["expert"], registry=self.registry)
        self.reasons: collections.Counter[str] = collections.Counter()
        self.totals = {name: collections.Counter[str]() for name in names}
        self._started = time.monotonic()
        self._bars: collections.deque[dict[str, Any]] = collections.deque(maxlen=BARS)

    def _bar(self) -> dict[str, Any]:
        number = int((time.monotonic() - self._started) / PERIOD)
        if not self._bars or self._bars[-1]["number"] != number:
            self._bars.append(
                {"number": number, "arrived": 0, "completed": 0, "met": 0, "dropped": 0, "failed": 0, "qos": 0.0}
            )
        return self._bars[-1]

    def arrived(self) -> None:
        """A request was understood."""
        self._arrived.inc()
        self._bar()["arrived"] += 1

    def decided(self, seconds: float) -> None:
        """A decision took this time."""
        self._decision.observe(seconds)

    def measured(self, expert: int, engines: EngineParams) -> None:
        """The engine of an expert is known; `engines` have fields [N]."""
        if self.log is not None:
            self.log.measured(expert, engines)

    def dropped(self, call: Call, reason: str) -> None:
        """No expert got the request."""
        self._dropped.labels(reason).inc()
        self.reasons[reason] += 1
        self._bar()["dropped"] += 1
        if self.log is not None:
            self.log.dropped(call, reason)

    def sent(self, expert: int) -> None:
        """A request was sent."""
        self._sent.labels(self._names[expert]).inc()

    def ended(self, expert: int, outcome: str, call: Call, first: float, finish: float, met: bool) -> None:
        """A request ended at an expert; `first` and `finish` are times, in s, of its first token and its end."""
        name, bar = self._names[expert], self._bar()
        self._ended.labels(name, outcome).inc()
        self.totals[name][outcome] += 1
        if outcome == "completed":
            tokens = max(call.tokens, 1)
            self._tokens.labels(name).inc(call.tokens)
            self._ttft.labels(name).observe(first - call.arrival)
            self._latency.labels(name).observe((finish - call.arrival) / tokens)
            bar["completed"] += 1
            if met:
                self._met.labels(name).inc()
                self.totals[name]["met"] += 1
                bar["met"] += 1
                bar["qos"] += float(call.predicted_scores[expert])
        elif outcome == "failed":
            bar["failed"] += 1
        if self.log is not None:
            self.log.ended(expert, outcome, call, first, finish, met)

    def set_state(self, count: np.ndarray, up: np.ndarray) -> None:
        """Open requests int32 [N] and whether each expert is up, bool [N]."""
        for name, one, is_up in zip(self._names, count, up, strict=True):
            self._open.labels(name).set(int(one))
            self._up.labels(name).set(bool(is_up))

    def bars(self) -> list[dict[str, Any]]:
        """The last periods, the present one at the end."""
        self._bar()
        return list(self._bars)

    def close(self) -> None:
        """Closes the log."""
        if self.log is not None:
            self.log.close()
