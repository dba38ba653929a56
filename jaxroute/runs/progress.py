"""Training progress: a live bar on a terminal, elsewhere lines from time to time."""

import math
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress(ExitStack):
    """Shows frames, rate, return, QoS and remaining time. Use it as a context manager; call `update` after each chunk.

    Until an episode has ended, it shows the reward per decision instead of the return.
    """

    def __init__(self, console: Console, frames: int, done: int = 0):
        """`frames` is the total, of which an earlier process has done `done`."""
        super().__init__()
        self._console, self._frames = console, frames
        columns = BarColumn(bar_width=10), TextColumn("{task.description}")
        self._bar = self.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        self._task = self._bar.add_task("compiling", total=frames)
        self._done, self._updated = done, time.monotonic()
        self._compiled = False
        self._printed = float("-inf")
        self._gain = ""

    def search(self, what: str, simulated: int, decisions: int, qos: float | None) -> None:
        """Reports `simulated` of the `decisions` that come before the first frame, and a mean QoS if there is one."""
        found = "" if qos is None else f", QoS {qos:.3f}"
        self._show(f"{what}: {simulated:,} of {decisions:,} decisions{found}", simulated >= decisions)
        self._updated = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._show(text, last=True)

    def update(self, frames: int, record: dict[str, Any]) -> None:
        """Reports `frames` frames in total; `record` has the metrics of the last chunk."""
        now = time.monotonic()
        rate = (frames - self._done) / (now - self._updated)
        # The time of the first chunk is mostly compilation.
        speed = f"{rate:,.0f}/s" if self._compiled else "compiled"
        left = f", {timedelta(seconds=round((self._frames - frames) / rate))} left" if self._compiled else ""
        self._done, self._updated, self._compiled = frames, now, True
        if math.isfinite(record["return"]):
            self._gain = f"return {record['return']:,.1f}"
        gain = self._gain or f"reward {record['reward']:.3f}"
        text = f"{frames:,} frames, {speed}, {gain}, QoS {record['qos']:.3f}{left}"
        self._bar.update(self._task, completed=frames)
        self._show(text, last=frames == self._frames)

    def _show(self, text: str, last: bool) -> None:
        self._bar.update(self._task, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._printed > SECONDS_BETWEEN_LINES or last):
            self._console.print(text, highlight=False)
            self._printed = now
