"""Reads lines, JSON and numbers of user files; each error is one `UserError` that names file, line and key."""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxroute.errors import UserError

MOST_TOKENS = 2**21 - 1
"""Maximum tokens of a request, and of a KV cache, that the simulator can count."""

GZIP = b"\x1f\x8b"

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


class Place:
    """A line of a file, or an entry of its arrays, for error messages."""

    __slots__ = ("line", "path", "unit")

    def __init__(self, path: Path, line: int, unit: str = "line"):
        self.path, self.line, self.unit = path, line, unit

    def error(self, problem: str) -> UserError:
        """The error that names this file and line."""
        return UserError(f"{self.path}, {self.unit} {self.line}: {problem}")


def shown(value: Any) -> str:
    """A value from a file as printable text on one line, shortened if necessary."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def names(found: Any) -> str:
    """Names from a file as one list for an error message."""
    listed = [shown(name) for name in found]
    more = f", ... ({len(listed)} in all)" if len(listed) > 12 else ""
    return (", ".join(listed[:12]) or "none") + more


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The file for reading, uncompressed if its content is gzip's, whatever its name."""
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP
    return gzip.open(path) if compressed else path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The non-blank lines of a UTF-8 file, plain or gzip, without line ends (LF or CR LF) and byte order mark."""
    for place, line, _ in read_ended_lines(path):
        yield place, line


def read_ended_lines(path: Path) -> Iterator[tuple[Place, str, bool]]:
    """As `read_lines`, and whether the line has a line end: the last one of a file that was cut has none."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                place = Place(path, number)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise place.error(f"not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
                if _CONTROL.search(line):
                    raise place.error("has control characters, so it is not text; save the file as UTF-8")
                if line:
                    yield place, line, raw.endswith(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the path of a file in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip ({error}); compress or copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError`, with the reason, also for a key that an object has twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} twice in one object")
    return found


def json_reason(error: ValueError) -> str:
    """What a `ValueError` of `parse_json` says."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def json_object(place: Place, line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises `UserError` at `place` where there is none."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise place.error(f"not JSON ({json_reason(error)}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise place.error(f"not a JSON object but {shown(record)}; write one JSON object a line")
    return record


def csv_cells(place: Place, line: str) -> list[str]:
    """The cells of a line of CSV. Raises `UserError` for quotes that do not end on the line."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True, strict=True))]
    except csv.Error as error:
        raise place.error(f"not CSV ({error}); correct the line or drop it") from None


def csv_row(place: Place, line: str, columns: int) -> list[str]:
    """The cells of a line that must have as many as the header."""
    cells = line.split(",") if '"' not in line else csv_cells(place, line)
    if len(cells) != columns:
        raise place.error(f"has {len(cells)} cells where the header has {columns}; complete the row or drop it")
    return cells


def member(place: Place, record: dict[str, Any], key: str, kind: type, inside: str = "") -> Any:
    """`record[key]`, which must exist and have the JSON type `kind`; `inside` is its place for error messages."""
    if key not in record:
        raise place.error(f"no '{key}'{inside}; it has {names(record)}")
    if not isinstance(record[key], kind):
        what = {str: "text", list: "a list", dict: "an object"}[kind]
        raise place.error(f"'{key}'{inside} must be {what}, is {shown(record[key])}")
    return record[key]


def tokens(place: Place, label: str, value: Any, low: int = 1) -> int:
    """A token count, an integer from `low` to `MOST_TOKENS`, from JSON or the text of a CSV cell."""
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit() and len(text) <= 10:
            value = int(text)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MOST_TOKENS:
        raise place.error(
            f"{label} must be a whole number of tokens from {low} to {MOST_TOKENS}, is {shown(value)}; "
            "correct or drop it"
        )
    return value


def number(place: Place, label: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, from JSON or the text of a CSV cell."""
    try:
        bad = isinstance(value, bool | list | dict | None)
        bad = bad or (isinstance(value, str) and ("_" in value or not value.isascii()))
        result = math.nan if bad else float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not (math.isfinite(result) and low <= result <= high):
        bounds = {(0.0, math.inf): ", 0 or more", (0.0, 1.0): " from 0 to 1"}.get((low, high), "")
        raise place.error(f"{label} must be a finite number{bounds}, is {shown(value)}; correct or drop it")
    return result
