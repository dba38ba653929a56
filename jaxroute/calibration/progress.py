"""Progress of a calibration: a live line on a terminal, elsewhere lines from time to time."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from jaxroute.calibration.search import Simulator
from jaxroute.runs.progress import SECONDS_BETWEEN_LINES


class SearchProgress:
    """Shows the current task, the generation, the loss, candidates per second, and the time to the deadline."""

    def __init__(self, console: Console, deadline: float):
        self._console, self._deadline = console, deadline
        self._status = Status("", console=console)
        self._printed = float("-inf")

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def start(self, what: str, simulator: Simulator) -> None:
        """A search of this name begins; `simulator` counts the candidates."""
        self._what, self._simulator = what, simulator
        self._began, self._before = time.monotonic(), simulator.evaluated
        self._printed = float("-inf")
        self._show(what)

    def update(self, generation: int, generations: int, loss: float) -> None:
        """A generation is done, and this is the lowest loss so far."""
        now = time.monotonic()
        rate = (self._simulator.evaluated - self._before) / (now - self._began)
        self._show(
            f"{self._what}: generation {generation} of at most {generations}, loss {loss:.6f}, {rate:,.0f} candidates/s"
        )

    def _show(self, text: str) -> None:
        now = time.monotonic()
        text = f"{text}, {max(self._deadline - now, 0):.0f} s to the deadline"
        if self._console.is_terminal:
            self._status.update(text)
        elif now - self._printed > SECONDS_BETWEEN_LINES:
            self._console.print(text, highlight=False, soft_wrap=True)
            self._printed = now
