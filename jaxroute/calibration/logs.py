"""Reads request logs of real servers in several formats; each error is one line that names its place."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.workload.files import Place, json_object, names, number, read_lines, shown, tokens

FEWEST = 20
"""Minimum number of requests, for half a dozen parameters and errors on requests that were not fitted."""

COLUMNS = {
    "arrival": ("arrival_time", "arrival_s"),
    "prompt": ("prompt_len", "prompt_tokens"),
    "output": ("output_len", "output_tokens"),
    "first": ("first_token_time", "first_token_s"),
    "last": ("finish_time", "last_token_s"),
}
"""Names of a column: that of `jaxroute replay`, then that of `rtx4090_llama31_8b_vllm.jsonl`."""


@dataclass(frozen=True)
class ServerLog:
    """R requests in order of arrival. Times are float64 [R], s since the first arrival."""

    path: Path
    ids: np.ndarray  # int64 [R], from the log, or the position
    arrival: np.ndarray
    first_token: np.ndarray
    finish: np.ndarray
    prompt_tokens: np.ndarray  # int32 [R]
    output_tokens: np.ndarray  # int32 [R]
    shared_tokens: np.ndarray | None  # int32 [R], leading tokens that an earlier prompt shares
    series: dict[str, np.ndarray] | None = None  # t (s), running, waiting (requests), if recorded
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a request, prompt and output."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def latencies(self, first_token: np.ndarray, finish: np.ndarray) -> dict[str, np.ndarray]:
        """ttft, tpot (s per token after the first; nan for one-token requests) and e2e, each [R], s."""
        gaps = self.output_tokens - 1
        tpot = np.where(gaps > 0, (finish - first_token) / np.maximum(gaps, 1), np.nan)
        return {"ttft": first_token - self.arrival, "tpot": tpot, "e2e": finish - self.arrival}

    @property
    def measured(self) -> dict[str, np.ndarray]:
        """The log's own latencies, as `latencies` gives them."""
        return self.latencies(self.first_token, self.finish)


def load_log(path: str | Path) -> ServerLog:
    """Reads a log: by its suffix JSONL, CSV, or the JSON of vLLM's `benchmark_serving` with per-request arrays.

    A file NAME_timeseries.csv beside NAME.jsonl is read too. Raises `UserError`.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".jsonl":
        rows = [(place, json_object(place, line)) for place, line in read_lines(path)]
        log = _from_rows(path, rows)
    elif ending == ".csv":
        log = _from_rows(path, _csv_rows(path))
    elif ending == ".json":
        log = _from_benchmark(path)
    else:
        raise UserError(f"{path}: a log ends in .jsonl, .csv or .json; rename it after its format")
    if len(log) < FEWEST:
        raise UserError(f"{path}: too few requests to calibrate on, {len(log)}; give {FEWEST} or more")
    return log


def _csv_rows(path: Path) -> list[tuple[Place, dict[str, Any]]]:
    lines = list(read_lines(path))
    if not lines:
        return []
    head = next(csv.reader([lines[0][1]]))
    rows = []
    for place, line in lines[1:]:
        cells = next(csv.reader([line]))
        if len(cells) != len(head):
            raise place.error(f"{len(cells)} cells under {len(head)} columns; correct or drop the line")
        rows.append((place, dict(zip(head, cells, strict=True))))
    return rows


def _from_rows(path: Path, rows: Sequence[tuple[Place, Mapping[str, Any]]]) -> ServerLog:
    if not rows:
        raise UserError(f"{path}: there is no request in it")
    place, first = rows[0]
    found = {}
    for what, known_names in COLUMNS.items():
        there = [name for name in known_names if name in first]
        if not there:
            raise place.error(f"no column {' or '.join(known_names)}; it has {names(first)}")
        found[what] = there[0]
    # The engine's own clock, if logged, has the more accurate arrival.
    start = "queued_s" if "queued_s" in first else found["arrival"]
    columns: dict[str, list[Any]] = {
        key: [] for key in ("id", "arrival", "first", "last", "prompt", "output", "shared")
    }
    before = -np.inf
    for index, (place, row) in enumerate(rows):
        for name in (*found.values(), start):
            if name not in row:
                raise place.error(f"no column {name}; it has {names(row)}")
        logged = number(place, found["arrival"], row[found["arrival"]])
        if logged < before:
            raise place.error(f"{found['arrival']} {logged:g} is before the line above's {before:g}; sort by arrival")
        before = logged
        arrival = number(place, start, row[start])
        first_token = number(place, found["first"], row[found["first"]])
        last = number(place, found["last"], row[found["last"]])
        if first_token < arrival:
            raise place.error(f"{found['first']} {first_token:g} is before {start} {arrival:g}; correct or drop it")
        if last < first_token:
            raise place.error(
                f"{found['last']} {last:g} is before {found['first']} {first_token:g}; correct or drop it"
            )
        columns["id"].append(_request_id(row.get("request_id"), index))
        columns["arrival"].append(arrival)
        columns["first"].append(first_token)
        columns["last"].append(last)
        columns["prompt"].append(tokens(place, found["prompt"], row[found["prompt"]]))
        columns["output"].append(tokens(place, found["output"], row[found["output"]]))
        shared = row.get("shared_prefix_tokens")
        columns["shared"].append(0 if shared in (None, "") else int(number(place, "shared_prefix_tokens", shared, 0.0)))
    return _log(path, columns, with_shared="shared_prefix_tokens" in first, series=_series(path))


def _request_id(value: Any, index: int) -> int:
    """The number in the id of a request, or its position in the log."""
    digits = str(value).rsplit("-", 1)[-1]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 18 else index


def _from_benchmark(path: Path) -> ServerLog:
    """Reads a result of vLLM's benchmark, written with `--save-result --save-detailed`."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); a log of one object a line must end in .jsonl") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object; give the result of vLLM's benchmark_serving")
    keys = ("input_lens", "output_lens", "ttfts", "itls")
    for key in keys:
        if not isinstance(record.get(key), list):
            raise UserError(f"{path}: no list {key}; run vLLM's benchmark with --save-result --save-detailed")
    count = len(record["input_lens"])
    start = record.get("start_times")
    if start is None and record.get("request_rate") == "inf" and not record.get("max_concurrency"):
        start = [0.0] * count  # all requests were sent at once
    if not isinstance(start, list):
        raise UserError(f"{path}: no list start_times; a vLLM from 2025-10 on writes it with --save-detailed")
    errors = record.get("errors") or [""] * count
    for key, values in (*((key, record[key]) for key in keys), ("start_times", start), ("errors", errors)):
        if len(values) != count:
            raise UserError(f"{path}: {key} has {len(values)} entries, input_lens {count}; the file is not whole")
    columns: dict[str, list[Any]] = {
        key: [] for key in ("id", "arrival", "first", "last", "prompt", "output", "shared")
    }
    failed = 0
    for index in range(count):
        if errors[index]:
            failed += 1
            continue
        place = _Entry(path, index)
        arrival = number(place, "start_times", start[index])
        ttft = number(place, "ttfts", record["ttfts"][index], 0.0)
        if not isinstance(record["itls"][index], list):
            raise place.error(f"itls must be a list of seconds, is {shown(record['itls'][index])}")
        gaps = [number(place, "itls", gap, 0.0) for gap in record["itls"][index]]
        columns["id"].append(index)
        columns["arrival"].append(arrival)
        columns["first"].append(arrival + ttft)
        columns["last"].append(arrival + ttft + sum(gaps))
        columns["prompt"].append(tokens(place, "input_lens", record["input_lens"][index]))
        columns["output"].append(tokens(place, "output_lens", record["output_lens"][index]))
        columns["shared"].append(0)
    if not columns["id"]:
        raise UserError(f"{path}: no request in it succeeded")
    notes = (f"{failed} requests that failed were left out",) if failed else ()
    return _log(path, columns, with_shared=False, notes=notes)


class _Entry(Place):
    """An entry of the arrays, for error messages."""

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path}, entry {self.line}: {problem}")


def _log(
    path: Path,
    columns: Mapping[str, list[Any]],
    with_shared: bool,
    series: dict[str, np.ndarray] | None = None,
    notes: tuple[str, ...] = (),
) -> ServerLog:
    arrival = np.asarray(columns["arrival"], np.float64)
    order = np.argsort(arrival, kind="stable")
    origin = float(arrival[order[0]])

    def column(key: str, kind: type, since: float = 0.0) -> np.ndarray:
        return (np.asarray(columns[key])[order] - since).astype(kind)

    if series is not None:
        series = {**series, "t": series["t"] - origin}
    return ServerLog(
        path=path,
        ids=column("id", np.int64),
        arrival=column("arrival", np.float64, origin),
        first_token=column("first", np.float64, origin),
        finish=column("last", np.float64, origin),
        prompt_tokens=column("prompt", np.int32),
        output_tokens=column("output", np.int32),
        shared_tokens=column("shared", np.int32) if with_shared else None,
        series=series,
        notes=notes,
    )


def _series(path: Path) -> dict[str, np.ndarray] | None:
    """The columns t, running and waiting of the file beside the log, if it exists."""
    beside = path.with_name(f"{path.stem}_timeseries.csv")
    if not beside.is_file():
        return None
    rows = _csv_rows(beside)
    wanted = ("t", "running", "waiting")
    if not rows:
        return None
    for name in wanted:
        if name not in rows[0][1]:
            raise rows[0][0].error(f"no column {name}; it has {names(rows[0][1])}")
    return {name: np.asarray([number(place, name, row[name]) for place, row in rows]) for name in wanted}
