"""What was read from a file of requests: the facts, in one line and as JSON, and what is unlikely about them.

A command collects the readings that happen while it sets up (`collect_readings`), prints and saves them. Without a
collector, as in a program of your own, what is unlikely is a Python warning.
"""

import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FASTEST, SLOWEST = 1000.0, 1 / 60.0
"""Requests/s beyond which the unit of the times is probably another one."""


@dataclass
class Tally:
    """What a reader notes on its way."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    changed: list[str] = field(default_factory=list)  # what was changed or assumed
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """The facts of a file that was read."""

    file: str
    format: str
    rows: int
    used: int
    left_out: Mapping[str, int]  # rows by reason
    span: float | None  # seconds from the first to the last arrival; None without arrivals
    rate: float | None  # mean requests/s; None if all arrive at once
    equal_times: int  # requests that arrive at the time of the one before
    prompt_tokens: tuple[float, float]  # median, p99
    output_tokens: tuple[float, float]
    changed: tuple[str, ...]  # what was changed or assumed
    warnings: tuple[str, ...]  # what is unlikely

    def line(self) -> str:
        """The facts in one line."""
        parts = [f"{self.file}: {self.format}, {self.used:,} of {self.rows:,} rows used"]
        if self.left_out:
            parts[0] += f" (left out: {', '.join(f'{count:,} {reason}' for reason, count in self.left_out.items())})"
        if self.span is not None:
            rate = "all at once" if self.rate is None else f"{self.rate:,.4g} requests/s"
            parts.append(f"{self.span:,.6g} s long, {rate}" if self.span else rate)
        if self.equal_times:
            parts.append(f"{self.equal_times:,} at the time of the one before")
        told = (("prompt", self.prompt_tokens), ("output", self.output_tokens))
        parts.append("tokens, median and p99: " + ", ".join(f"{what} {a:,.0f} and {b:,.0f}" for what, (a, b) in told))
        return "; ".join([*parts, *self.changed])

    def lines(self) -> list[str]:
        """The line, and one for each warning."""
        return [self.line(), *(f"warning: {self.file}: {warning}" for warning in self.warnings)]

    def facts(self) -> dict[str, Any]:
        """The facts as JSON."""
        values = asdict(self)
        for key in ("prompt_tokens", "output_tokens"):
            values[key] = dict(zip(("median", "p99"), values[key], strict=True))
        lists = {key: list(values[key]) for key in ("changed", "warnings")}
        return {**values, "left_out": dict(self.left_out), **lists}


def make_reading(
    path: Path, kind: str, tally: Tally, times: np.ndarray | None, prompts: np.ndarray, outputs: np.ndarray
) -> Reading:
    """The facts of requests of these lengths, float64 [R] or int [R], that arrive at `times`, ascending, if at any."""
    used = len(prompts)
    span = None if times is None else float(times[-1] - times[0])
    rate = (used - 1) / span if span else None
    unlikely = list(tally.warnings)
    if rate is not None and rate > FASTEST:
        unlikely.append(f"{rate:,.0f} requests/s; were they sent at once, or are times in another unit (time_unit)?")
    if rate is not None and used > 2 and rate < SLOWEST:
        unlikely.append(f"one request every {1 / rate:,.0f} s; are its times in another unit (time_unit)?")
    median = float(np.median(outputs))
    if median <= 1:
        unlikely.append("the median answer has one token; check how the output tokens were counted")
    if 2 * used < tally.rows:
        unlikely.append(f"{tally.rows - used:,} of {tally.rows:,} rows left out")
    equal = 0 if times is None else int((np.diff(times) == 0).sum())
    step = None if times is None else tick_of(times)
    if step is not None:
        unlikely.append(
            f"its times are multiples of {step:g} s, with {used / (used - equal):.3g} requests each at once: "
            "bursts, or rounded times, which spread_ticks spreads over their tick"
        )
    lengths = [(float(np.median(column)), float(np.percentile(column, 99))) for column in (prompts, outputs)]
    reading = Reading(
        str(path),
        kind,
        tally.rows,
        used,
        dict(tally.left_out),
        span,
        rate,
        equal,
        lengths[0],
        lengths[1],
        tuple(tally.changed),
        tuple(unlikely),
    )
    _announce(reading)
    return reading


def tick_of(times: np.ndarray) -> float | None:
    """The step in seconds of which the gaps between different times (ascending) are multiples, within 1 %.

    None if there is none, or few requests share a time.
    """
    ticks = np.unique(times)
    if len(ticks) < 3 or len(times) < 2 * len(ticks):
        return None
    steps = np.diff(ticks)
    step = float(np.median(steps[steps < 1.5 * steps.min()]))
    return step if np.allclose(steps / step, np.rint(steps / step), rtol=0, atol=0.01) else None


_collected: ContextVar[list[Reading] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_readings() -> Generator[list[Reading]]:
    """Collects the readings that happen inside, instead of warnings on the unlikely ones."""
    readings: list[Reading] = []
    token = _collected.set(readings)
    try:
        yield readings
    finally:
        _collected.reset(token)


def _announce(reading: Reading) -> None:
    readings = _collected.get()
    if readings is not None:
        readings.append(reading)
        return
    for text in reading.lines()[1:]:
        warnings.warn(text.removeprefix("warning: "), stacklevel=4)
