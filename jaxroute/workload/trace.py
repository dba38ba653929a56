"""Reads recorded request traces: Azure LLM 2023 CSV, Mooncake JSONL, and jaxroute's CSV."""

import re
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.workload.files import Place, json_object, names, number, read_lines, shown, tokens
from jaxroute.workload.table import Trace

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")  # timestamp in ms
OWN = ("arrival_time", "prompt_len", "output_len")  # arrival_time in seconds
LONE_TICK = 3.0  # seconds per Mooncake tick if the file has only one; the published traces have ticks of 3 s

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def load_trace(path: str | Path) -> Trace:
    """Reads a trace. Its columns determine the format:

    - Azure LLM 2023 (github.com/Azure/AzurePublicDataset): CSV with TIMESTAMP (date and time; UTC unless it has an
      offset; any number of decimals), ContextTokens, GeneratedTokens.
    - Mooncake (github.com/kvcache-ai/Mooncake): one JSON object per line with timestamp (ms), input_length,
      output_length. Its timestamps are ticks of 3 seconds; the requests of a tick are spread evenly over it, beginning
      at its start. A tick lasts until the next timestamp, but not longer than the median step of the file.
    - jaxroute: CSV with arrival_time (seconds), prompt_len, output_len.

    Other columns are ignored. Rows must be ordered by time. Raises `UserError` for any other content.
    """
    path = Path(path)
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: the file is empty; a trace needs a row for each request")
    mooncake = path.suffix in (".jsonl", ".json") or (path.suffix != ".csv" and first[1].startswith("{"))
    rows = _mooncake_rows(first, lines) if mooncake else _csv_rows(first, lines)

    whole, fraction, prompts, outputs = [], [], [], []
    last = (0, 0.0)
    for place, time, prompt, output in rows:
        if whole and time < last:
            raise place.error("its time lies before that of the row above; sort the rows by time")
        last = time
        whole.append(time[0])
        fraction.append(time[1])
        prompts.append(prompt)
        outputs.append(output)
    if not whole:
        raise UserError(f"{path}: has a header but no rows; a trace needs a row for each request")

    # Whole seconds are subtracted as integers: as floats, seconds since 1970 would lose digits of the fraction.
    times = np.subtract(whole, whole[0]) + np.subtract(fraction, fraction[0])
    return Trace(
        times=_spread(times) if mooncake else times,
        prompt_tokens=np.asarray(prompts, np.int32),
        output_tokens=np.asarray(outputs, np.int32),
        first_time=whole[0] + fraction[0],
    )


_Row = tuple[Place, tuple[int, float], int, int]  # place, (whole seconds, fraction), prompt tokens, output tokens


def _mooncake_rows(first: tuple[Place, str], rest: Iterator[tuple[Place, str]]) -> Iterator[_Row]:
    for place, line in chain([first], rest):
        record = json_object(place, line)
        missing = [key for key in MOONCAKE if key not in record]
        if missing:
            raise place.error(f"no {names(missing)}; it has {names(record)}")
        time, prompt, output = (record[key] for key in MOONCAKE)
        milliseconds = number(place, "'timestamp'", time, low=0.0)
        yield place, (0, milliseconds / 1000), *_lengths(place, MOONCAKE, prompt, output)


def _csv_rows(first: tuple[Place, str], rest: Iterator[tuple[Place, str]]) -> Iterator[_Row]:
    header, line = first
    columns = _cells(line)
    # The format with the most common columns, so that the message names the missing ones.
    layout = max((AZURE, OWN), key=lambda keys: len(set(keys) & set(columns)))
    missing = [key for key in layout if key not in columns]
    if len(missing) == len(layout):
        raise header.error(
            f"not a trace's columns: {names(columns)}; a CSV needs {', '.join(OWN)} or {', '.join(AZURE)}"
        )
    if missing:
        raise header.error(f"no column {names(missing)}; the file has {names(columns)}")
    time_at, prompt_at, output_at = (columns.index(key) for key in layout)
    for place, line in rest:
        cells = _cells(line)
        if len(cells) != len(columns):
            raise place.error(
                f"has {len(cells)} cells where the header has {len(columns)}; complete the row or drop it"
            )
        if layout is AZURE:
            time = _date(place, cells[time_at])
        else:
            time = (0, number(place, "'arrival_time'", cells[time_at], low=0.0))
        yield place, time, *_lengths(place, layout, cells[prompt_at], cells[output_at])


def _lengths(place: Place, layout: tuple[str, str, str], prompt: Any, output: Any) -> tuple[int, int]:
    return tokens(place, f"'{layout[1]}'", prompt), tokens(place, f"'{layout[2]}'", output)


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(",")]


def _date(place: Place, text: str) -> tuple[int, float]:
    """Seconds since 1970: whole part and fraction. Python's parser reads six decimals, and Azure writes seven."""
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(match[1] + (match[3] or "+00:00"))
    except ValueError:
        raise place.error(
            f"'TIMESTAMP' must be a date and time like 2023-11-16 18:17:03.97996, is {shown(text)}; correct or drop it"
        ) from None
    return int(moment.timestamp()), float(match[2] or 0)


def _spread(times: np.ndarray) -> np.ndarray:
    """Spreads requests of equal times evenly over their tick."""
    ticks, tick_of, sizes = np.unique(times, return_inverse=True, return_counts=True)
    steps = np.diff(ticks)
    usual = np.median(steps) if len(steps) else LONE_TICK  # a longer step contains ticks without requests
    lengths = np.minimum(np.append(steps, usual), usual)
    place_in_tick = np.arange(len(times)) - (np.cumsum(sizes) - sizes)[tick_of]
    return times + (lengths / sizes)[tick_of] * place_in_tick
