"""The formats of recorded requests, as a table: a new one is one entry. docs/formats.md describes each.

A format is recognised by the columns or keys that it needs, not by the file's name.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from jaxroute.errors import UserError
from jaxroute.workload.benchmark_results import AIPERF, GUIDELLM, VLLM, aiperf_records, guidellm_records, vllm_records
from jaxroute.workload.content import Content
from jaxroute.workload.files import MOST_TOKENS, Place, names, number, shown, tokens
from jaxroute.workload.record import HASHED_TOKENS, Record, Time

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Parts of a second, by the names of `time_unit`."""

LATEST = 1e11
"""Seconds since 1970 beyond which a time cannot be meant: the year 5138."""

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)


class Columns(NamedTuple):
    """The columns of a format of rows. Times of tokens are on the clock of `start`, or else of the arrival."""

    time: str
    prompt: str
    output: str
    unit: str = "s"  # of the times: date, or one of `UNITS`
    first: str | None = None  # time of the first token
    last: str | None = None
    start: str | None = None  # arrival at the engine, on the engine's clock
    identity: str | None = None  # of the request
    shared: str | None = None  # leading tokens of the prompt that an earlier one shares
    hash_ids: str | None = None  # what the prompt consists of (`record.HASHED_TOKENS`)
    earliest: float = 0.0  # smallest time that can be meant
    failed: str | None = None  # what a row without output tokens is, which is then left out

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns by which the format is recognised."""
        return self.time, self.prompt, self.output


@dataclass(frozen=True)
class Format:
    """A format of recorded requests."""

    name: str
    columns: Columns | None = None  # of rows
    keys: tuple[str, ...] = ()  # of a document: it has one of them
    records: Callable[[Content, int | None], Iterator[Record]] | None = None  # of a document: content, chosen run
    ordered: bool = True  # rows must be in order of time; otherwise they are sorted

    def matches(self, content: Content) -> bool:
        """Whether the content has the format's columns or keys."""
        if self.columns is not None:
            return set(self.columns.needed) <= set(content.keys)
        return content.kind == "json" and any(key in content.first for key in self.keys)


FORMATS = (
    Format(
        "jaxroute",
        Columns(
            "arrival_time", "prompt_len", "output_len", first="first_token_time", last="finish_time",
            identity="request_id", shared="shared_prefix_tokens",
        ),
    ),
    Format(
        "recorded server",
        Columns(
            "arrival_s", "prompt_tokens", "output_tokens", first="first_token_s", last="last_token_s",
            start="queued_s", identity="request_id", shared="shared_prefix_tokens", earliest=-math.inf,
        ),
    ),
    Format(
        "jaxroute serve",
        Columns(
            "sent_time", "prompt_tokens", "completion_tokens", first="first_token_time", last="finish_time",
            identity="request_id", failed="failed or cancelled",
        ),
        ordered=False,
    ),
    Format("Azure LLM", Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", unit="date")),
    Format("Mooncake", Columns("timestamp", "input_length", "output_length", unit="ms", hash_ids="hash_ids")),
    Format(
        "BurstGPT",
        Columns("Timestamp", "Request tokens", "Response tokens", failed="failed (no response tokens)"),
    ),
    Format("ServeGen", Columns("timestamp", "input_tokens", "output_tokens", identity="request_id")),
    Format("vidur", Columns("arrived_at", "num_prefill_tokens", "num_decode_tokens")),
    Format(
        "LLMServingSim",
        Columns(
            "arrival_time", "input_toks", "output_toks", first="first_token_ts", last="last_token_ts",
            start="queued_ts", identity="request_id",
        ),
        ordered=False,
    ),
    Format("LLMServingSim workload", Columns("arrival_time_ns", "input_toks", "output_toks", unit="ns")),
    Format("vLLM benchmark", keys=VLLM, records=vllm_records, ordered=False),
    Format("guidellm", keys=GUIDELLM, records=guidellm_records, ordered=False),
    Format("aiperf", keys=AIPERF, records=aiperf_records, ordered=False),
)  # fmt: skip
"""All formats; a file of none of them is an error."""


def recognise(content: Content) -> Format | None:
    """The format of the content; None if it has no format's columns or keys. Raises `UserError` if it has several's."""
    found = [form for form in FORMATS if form.matches(content)]
    if len(found) > 1:
        raise content.head.error(
            f"has the columns of {' and of '.join(form.name for form in found)}; keep those of one format"
        )
    return found[0] if found else None


def unknown(content: Content) -> UserError:
    """The error for content of no format; it names the columns that the nearest one misses."""
    rows = [form for form in FORMATS if form.columns]
    shares = {form.name: len(set(form.columns.needed) & set(content.keys)) for form in rows if form.columns}
    nearest = max(rows, key=lambda form: shares[form.name])
    assert nearest.columns is not None
    if shares[nearest.name]:
        missing = [name for name in nearest.columns.needed if name not in content.keys]
        what = "column " if content.kind == "csv" else ""
        has = "the file has" if content.kind == "csv" else "it has"
        return content.head.error(f"no {what}{names(missing)} of {nearest.name}; {has} {names(content.keys)}")
    known = " or ".join(", ".join(form.columns.needed) for form in rows[:4] if form.columns)
    if content.kind == "csv" and all(re.fullmatch(r"[-+.\deE:\s]*", key) for key in content.keys[:3]):
        return content.head.error(f"has no column names but {names(content.keys)}; write a header, such as {known}")
    return content.head.error(
        f"not a trace's columns: {names(content.keys)}; it needs {known}, or another format of docs/formats.md"
    )


def row_records(
    content: Content, columns: Columns, time_unit: str | None, timed: bool, contents: bool
) -> Iterator[Record]:
    """The records of a format of rows, with the times of tokens if `timed`, and the hash_ids with `contents`.

    Raises `UserError`, with the line, for a value that cannot be meant.
    """
    if time_unit is not None:
        if columns.unit == "date":
            raise UserError(f"{content.path}: its times are dates, which have no unit; leave time_unit out")
        if time_unit != columns.unit:
            content.tally.changed.append(f"times in {time_unit}, as time_unit says (the format has {columns.unit})")
        columns = columns._replace(unit=time_unit)
    needed = columns.needed
    if timed:  # a log may count from any instant
        columns = columns._replace(earliest=-math.inf)
        needed += tuple(name for name in (columns.first, columns.last) if name is not None)
        missing = [name for name in needed if name not in content.keys]
        if missing:
            raise content.head.error(f"no column {names(missing)}, a time of tokens; it has {names(content.keys)}")
    own = (
        columns.identity,
        columns.start if timed else None,
        columns.shared if timed else None,
        columns.hash_ids if contents else None,
    )
    optional = [name for name in own if name is not None and name in content.keys]
    at = [len(needed) + optional.index(name) if name in optional else None for name in own]
    identity_at, start_at, shared_at, hash_ids_at = at
    parse, fine, coarse = _time_parser(columns), False, columns.unit in ("ms", "us", "ns")
    label = [f"'{name}'" for name in needed]
    for place, values in content.rows(needed, optional):
        time = parse(place, label[0], values[0])
        fine = fine or (coarse and _has_fraction(values[0]))
        output = tokens(place, label[2], values[2], low=0 if columns.failed else 1)
        if output == 0:
            content.tally.left_out[str(columns.failed)] += 1
            continue
        identity = None if identity_at is None else values[identity_at]
        record = Record(place, time, tokens(place, label[1], values[1]), output, identity=identity)
        if timed:
            engine = None if start_at is None else (str(columns.start), values[start_at])
            record = _with_tokens(record, columns, engine, values[3], values[4])
        if shared_at is not None:
            shared = values[shared_at] or 0
            record = record._replace(shared=int(number(place, f"'{columns.shared}'", shared, 0.0, MOST_TOKENS)))
        if hash_ids_at is not None and values[hash_ids_at] is not None:
            ids = _hash_ids(place, f"'{columns.hash_ids}'", values[hash_ids_at], record.prompt)
            record = record._replace(hash_ids=ids)
        yield record
    if fine:
        content.tally.warnings.append(
            f"'{columns.time}' has fractions of 1 {columns.unit}, in which the format counts; "
            "if its times are seconds, say so with time_unit=s"
        )


def _hash_ids(place: Place, label: str, value: Any, prompt: int) -> tuple[int, ...]:
    """The ids of the prompt's tokens. Raises `UserError`."""
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise place.error(
            f"{label} must be a list of whole numbers of 0 or more, is {shown(value)}; correct or drop it"
        )
    wanted = -(-prompt // HASHED_TOKENS)
    if len(value) != wanted:
        raise place.error(
            f"{label} has {len(value)} ids, and a prompt of {prompt} tokens has {wanted}, one for each {HASHED_TOKENS} "
            "tokens; correct or drop it"
        )
    return tuple(value)


def _with_tokens(record: Record, columns: Columns, engine: tuple[str, Any] | None, first: Any, last: Any) -> Record:
    """The record with the times of its first and last token, which must follow each other.

    `engine`: name and value of the arrival on the engine's clock, if it is recorded.
    """
    parse, place = _time_parser(columns), record.place
    label, start = columns.time, record.time
    if engine is not None:
        label, start = engine[0], parse(place, f"'{engine[0]}'", engine[1])
    times = (
        (label, start),
        *((str(n), parse(place, f"'{n}'", v)) for n, v in ((columns.first, first), (columns.last, last))),
    )
    for (before, earlier), (name, later) in pairwise(times):
        if later < earlier:
            raise place.error(f"'{name}' {sum(later):g} is before '{before}' {sum(earlier):g}; correct or drop it")
    return record._replace(start=start, first=times[1][1], last=times[2][1])


def _has_fraction(value: Any) -> bool:
    return not isinstance(value, int) and not float(value).is_integer()


def _time_parser(columns: Columns) -> Callable[[Place, str, Any], Time]:
    """From a place, a label and a value to a time; nanoseconds keep all their digits."""
    if columns.unit == "date":
        return _date
    parts, low = UNITS[columns.unit], columns.earliest

    def parse(place: Place, label: str, value: Any) -> Time:
        seconds = number(place, label, value, low) / parts
        if abs(seconds) > LATEST:
            raise place.error(
                f"{label} is {shown(value)}, in {columns.unit} beyond the year 5138; name its unit with time_unit"
            )
        if parts == UNITS["ns"]:
            whole, rest = divmod(int(float(value) if isinstance(value, str) and "." in value else value), parts)
            return whole, rest / parts
        return 0, seconds

    return parse


def _date(place: Place, label: str, text: Any) -> Time:
    """Seconds since 1970: whole part and fraction. Python's parser reads six decimals, and Azure writes seven."""
    match = _TIMESTAMP.fullmatch(text.strip()) if isinstance(text, str) else None
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(match[1] + ("+00:00" if match[3] in (None, "Z") else match[3]))
    except ValueError:
        raise place.error(
            f"{label} must be a date and time like 2023-11-16 18:17:03.97996, is {shown(text)}; correct or drop it"
        ) from None
    return int(moment.timestamp()), float(match[2] or 0)
