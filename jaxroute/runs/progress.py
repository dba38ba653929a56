"""Training progress: a live bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress:
    """Shows frames, rate, return, QoS and the time left. Use as a context; call `update` after every chunk.

    Until an episode has ended, the reward per decision stands in place of the return.
    """

    def __init__(self, console: Console, frames: int, done: int = 0):
        """`frames` in all, of which `done` were made by an earlier process."""
        self._console, self._frames = console, frames
        columns = BarColumn(bar_width=10), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=frames)
        self._done, self._updated = done, time.monotonic()
        self._compiled = False
        self._printed = float("-inf")
        self._gain = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, frames: int, record: dict[str, Any]) -> None:
        """After `frames` frames in all, `record` being the last chunk's metrics."""
        now = time.monotonic()
        rate = (frames - self._done) / (now - self._updated)
        # The first chunk's time is mostly compilation.
        speed = f"{rate:,.0f}/s" if self._compiled else "compiled"
        left = f", {timedelta(seconds=round((self._frames - frames) / rate))} left" if self._compiled else ""
        self._done, self._updated, self._compiled = frames, now, True
        if math.isfinite(record["return"]):
            self._gain = f"return {record['return']:,.1f}"
        gain = self._gain or f"reward {record['reward']:.3f}"
        text = f"{frames:,} frames, {speed}, {gain}, QoS {record['qos']:.3f}{left}"
        self._bar.update(self._task, completed=frames, description=text)
        if not self._console.is_terminal and (now - self._printed > SECONDS_BETWEEN_LINES or frames == self._frames):
            self._console.print(text, highlight=False)
            self._printed = now
