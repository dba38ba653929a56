"""Reads recorded requests of any known format: `load_trace` their arrivals and lengths, `read_requests` also times."""

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError, require_known
from jaxroute.workload.content import Content, open_content
from jaxroute.workload.formats import UNITS, Format, recognise, row_records, unknown
from jaxroute.workload.reading import Reading, make_reading, tick_of
from jaxroute.workload.record import Record, Time
from jaxroute.workload.table import Trace


@dataclass(frozen=True)
class Recorded:
    """R recorded requests in order of arrival. Times are float64 [R], seconds since the first arrival."""

    times: np.ndarray
    prompt_tokens: np.ndarray  # int32 [R]
    output_tokens: np.ndarray  # int32 [R]
    first_token: np.ndarray  # nan where it was not asked for
    finish: np.ndarray
    identities: list[Any]  # as the file has them, or None; empty if times were not asked for
    shared_tokens: np.ndarray | None  # int32 [R], leading tokens that an earlier prompt shares
    first_time: float  # seconds, the first arrival on the clock of the file
    reading: Reading
    hash_ids: tuple[tuple[int, ...], ...] | None  # of each prompt (`record`), if asked for and all have them


def load_trace(
    path: str | Path, *, spread_ticks: bool = False, time_unit: str | None = None, run: int | None = None
) -> Trace:
    """Reads the arrivals and lengths of requests from a file of any format in docs/formats.md, recognised by content.

    Times stay as they are, ties too, unless `spread_ticks` spreads requests of equal times evenly over their tick,
    beginning at its start; the different times must then be multiples of one step, as the 3 s of Mooncake's published
    traces. `path` is a file, plain or gzip. `time_unit` is the unit of the times (s, ms, us, ns) if it is not the
    format's. `run` selects one of several results in the file, from 1 on. Raises `UserError`, with file and line, for
    what cannot be meant.
    """
    found = read_requests(path, spread_ticks=spread_ticks, time_unit=time_unit, run=run)
    return Trace(found.times, found.prompt_tokens, found.output_tokens, found.first_time, found.reading)


def read_requests(
    path: str | Path,
    *,
    timed: bool = False,
    contents: bool = False,
    spread_ticks: bool = False,
    time_unit: str | None = None,
    run: int | None = None,
) -> Recorded:
    """As `load_trace`; with `timed` also the times of first and last tokens, which then set the clock if it differs;
    with `contents` also what prompts consist of, where the format says it.

    Requests whose times of tokens cannot be used are left out. Raises `UserError` if these are all, or the format has
    no such times.
    """
    path = Path(path)
    if time_unit is not None:
        require_known(time_unit, UNITS, "time_unit", f"{path}: ")
    content = open_content(path)
    form = recognise(content)
    if form is None:
        raise unknown(content)
    columns = _Columns(path, content, form, timed)
    if form.columns is not None:
        if run is not None:
            raise UserError(f"{path}: run is {run}, but {form.name} files hold one list of requests; leave run out")
        if timed and form.columns.first is None:
            raise UserError(f"{path}: {form.name} has no times of tokens; give a log with the times of each request")
        records = row_records(content, form.columns, time_unit, timed, contents)
    else:
        if time_unit is not None:
            raise UserError(f"{path}: time_unit is for columns of times; {form.name} has its own, leave it out")
        assert form.records is not None
        records = form.records(content, run)
    for record in records:
        columns.add(record)
    return columns.finish(spread_ticks)


class _Columns:
    """The records as columns, with times since the first record."""

    def __init__(self, path: Path, content: Content, form: Format, timed: bool):
        self.path, self.form, self.tally, self.timed = path, form, content.tally, timed
        self.origin: Time | None = None  # of the clock of `start`, or of the arrivals
        self.last: Time = (0, 0.0)
        self.times, self.first, self.end = array("d"), array("d"), array("d")
        self.prompts, self.outputs, self.shared = array("i"), array("i"), array("i")
        self.identities: list[Any] = []
        self.hash_ids: list[tuple[int, ...]] = []
        self.seen: dict[Any, int] = {}
        self.timed_answers, self.untimed_answers = 0, 0

    def add(self, record: Record) -> None:
        """Adds a record, or leaves it out."""
        place, time, prompt, output, start, first, end, identity, shared, untimed, hash_ids = record
        if self.form.ordered:
            if self.times and time < self.last:
                raise place.error("its time lies before that of the row above; sort the rows by time")
            self.last = time
        if identity is not None and identity != "":
            self._note_identity(record)
        if self.timed:
            if start is None or first is None or end is None or untimed:
                untimed = untimed or "without times of tokens"
            elif first <= start:
                untimed = "with the first token at the time of arrival"
            elif output > 1 and end <= first:
                untimed = "with several tokens at one time"
            if untimed:
                self.tally.left_out[untimed] += 1
                self.untimed_answers += output > 1
                return
            self.timed_answers += output > 1
            assert start is not None and first is not None and end is not None
            time = start
            origin = self.origin = self.origin or start
            self.first.append((first[0] - origin[0]) + (first[1] - origin[1]))
            self.end.append((end[0] - origin[0]) + (end[1] - origin[1]))
        origin = self.origin = self.origin or time
        self.times.append((time[0] - origin[0]) + (time[1] - origin[1]))
        self.prompts.append(prompt)
        self.outputs.append(output)
        if shared is not None:
            self.shared.append(shared)
        if hash_ids is not None:
            self.hash_ids.append(hash_ids)
        if self.timed:
            self.identities.append(identity)

    def _note_identity(self, record: Record) -> None:
        identity, place = record.identity, record.place
        if isinstance(identity, dict | list):
            raise place.error(f"its request id must be a name or a number, is {identity!r:.40}; correct it")
        if identity in self.seen:
            before = f"{place.unit} {self.seen[identity]}"
            raise place.error(f"has the request id {identity!r:.40} of {before}; drop one of them")
        self.seen[identity] = place.line

    def finish(self, spread_ticks: bool) -> Recorded:
        """All columns in order of arrival."""
        path, tally = self.path, self.tally
        if self.untimed_answers and not self.timed_answers:
            reason = tally.left_out.most_common(1)[0][0]
            raise UserError(
                f"{path}: no inter-token latencies, {self.untimed_answers} requests {reason}: it was not streamed, or "
                "first tokens have no time, so TTFT and time per token cannot be told; record it again, streamed"
            )
        if not self.times or self.origin is None:
            why = ", ".join(f"{count} {reason}" for reason, count in tally.left_out.items())
            raise UserError(
                f"{path}: has no request that can be used ({why})"
                if tally.rows
                else f"{path}: has a header but no rows; a trace needs a row for each request"
            )
        times = np.asarray(self.times)
        order = np.arange(len(times)) if self.form.ordered and not self.timed else np.argsort(times, kind="stable")
        if (np.diff(order) < 0).any():
            tally.changed.append("sorted by arrival")
        begin = float(times[order[0]])
        times = times[order] - begin
        prompts, outputs = (np.asarray(column, np.int32)[order] for column in (self.prompts, self.outputs))
        step = tick_of(times) if spread_ticks else None
        if spread_ticks:
            if step is None:
                raise UserError(
                    f"{path}: spread_ticks needs times that are multiples of one step, with two or more requests each; "
                    "leave it out"
                )
            times = _spread(times, step)
            tally.changed.append(f"times spread over ticks of {step:g} s")
        never = np.full(len(times), np.nan)
        first, end = (np.asarray(column)[order] - begin if self.timed else never for column in (self.first, self.end))
        return Recorded(
            times,
            prompts,
            outputs,
            first,
            end,
            [self.identities[index] for index in order] if self.timed else [],
            np.asarray(self.shared, np.int32)[order] if len(self.shared) == len(times) else None,
            self.origin[0] + self.origin[1] + begin,
            make_reading(path, self.form.name, tally, times, prompts, outputs),
            tuple(self.hash_ids[index] for index in order) if len(self.hash_ids) == len(times) else None,
        )


def _spread(times: np.ndarray, step: float) -> np.ndarray:
    """Spreads requests of equal times evenly over their tick: `step` seconds, or less if the next tick comes before."""
    ticks, tick_at, sizes = np.unique(times, return_inverse=True, return_counts=True)
    lengths = np.minimum(np.append(np.diff(ticks), step), step)
    place_in_tick = np.arange(len(times)) - (np.cumsum(sizes) - sizes)[tick_at]
    return times + (lengths / sizes)[tick_at] * place_in_tick
