"""Progress of a sweep: on a terminal a table of the best trials and a bar, elsewhere lines from time to time."""

import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jaxroute.runs.progress import SECONDS_BETWEEN_LINES
from jaxroute.sweeps.plan import Batch
from jaxroute.sweeps.results import ranking, survivor_count
from jaxroute.sweeps.spec import Spec

BEST = 10  # trials in the table


class SweepDisplay(ExitStack):
    """Use it as a context manager; call `chunk_done` and `finished` while batches run."""

    def __init__(self, console: Console, spec: Spec):
        super().__init__()
        self._console, self._spec = console, spec
        trials, frames = len(spec.trials), 0
        self._total = 0.0  # estimated frames of all trainings; fewer are trained if too many trials diverge
        for rung in spec.rungs:
            self._total += len(spec.seeds) * trials * (rung - frames)
            trials, frames = survivor_count(trials, spec.keep), rung
        self._finished = self._earlier = 0.0
        self._under_way: dict[str, float] = {}
        self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=console)
        self._task = self._bar.add_task("compiling", total=self._total)
        self._rows: list[dict[str, Any]] = []
        live = Live(self._bar, console=console, auto_refresh=False)
        self._live = self.enter_context(live) if console.is_terminal else None
        self._started = self._printed = time.monotonic()

    def chunk_done(self, batch: Batch, share: float) -> None:
        """Reports that `share` of the training of the batch is done."""
        self._under_way[batch.name] = share * self._frames(batch)
        self._show(due=time.monotonic() - self._printed > SECONDS_BETWEEN_LINES)

    def finished(self, batch: Batch, rows: list[dict[str, Any]], earlier: bool = False) -> None:
        """Reports a finished batch, which an `earlier` process may have run; `rows` are the whole table."""
        self._under_way.pop(batch.name, None)
        self._finished += self._frames(batch)
        self._earlier += self._frames(batch) if earlier else 0.0
        self._rows = rows
        if not earlier:
            self._show(due=True)

    def _frames(self, batch: Batch) -> int:
        before = self._spec.rungs[batch.rung - 1] if batch.rung else 0
        return len(batch.rows) * (self._spec.rungs[batch.rung] - before)

    def _show(self, due: bool) -> None:
        done = self._finished + sum(self._under_way.values())
        rate = (done - self._earlier) / (time.monotonic() - self._started)
        left = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown time"
        text = f"{done:,.0f} of {self._total:,.0f} frames, {rate:,.0f}/s, {left} left"
        if self._live:
            self._bar.update(self._task, completed=done, description=text)
            self._live.update(Group(best_table(self._spec, self._rows), self._bar), refresh=True)
        elif due:
            best = ranking(self._rows)[:1]
            leader = f", best trial {best[0].trial}: QoS {best[0].qos:.4f}" if best else ""
            self._console.print(text + leader, highlight=False)
            self._printed = time.monotonic()


def best_table(spec: Spec, rows: list[dict[str, Any]]) -> Table:
    """The best trials; ± is half of a 95 % interval over seeds."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("trial", "QoS", "frames"):
        table.add_column(column, justify="right")
    for key in spec.keys:
        table.add_column(key.rpartition(".")[2], justify="right")
    for place in ranking(rows)[:BEST]:
        values = map(short_text, spec.trials[place.trial].values.values())
        table.add_row(str(place.trial), place.text, f"{place.frames:,}", *values)
    return table


def short_text(value: Any) -> str:
    """A value of a configuration in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
