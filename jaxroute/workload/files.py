"""Reads lines and numbers of user files; each error is one `UserError` that names file, line and key."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxroute.errors import UserError

MOST_TOKENS = 2**21 - 1
"""Maximum tokens of a request, and of a KV cache, that the simulator can count."""


class Place:
    """A line of a file, for error messages."""

    def __init__(self, path: Path, line: int):
        self.path, self.line = path, line

    def error(self, problem: str) -> UserError:
        """The error that names this file and line."""
        return UserError(f"{self.path}, line {self.line}: {problem}")


def shown(value: Any) -> str:
    """A value from a file as printable text on one line, shortened if necessary."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def names(found: Any) -> str:
    """Names from a file as one list for an error message."""
    return ", ".join(shown(name) for name in found) or "none"


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The non-blank lines of a UTF-8 file, without line ends (LF or CR LF) and byte order mark."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = Place(path, number)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise place.error(f"not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
                if line:
                    yield place, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the path of a file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def json_object(place: Place, line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises `UserError` at `place` where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise place.error(f"not JSON ({reason}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise place.error(f"not a JSON object but {shown(record)}; write one JSON object a line")
    return record


def member(place: Place, record: dict[str, Any], key: str, kind: type, inside: str = "") -> Any:
    """`record[key]`, which must exist and have the JSON type `kind`; `inside` is its place for error messages."""
    if key not in record:
        raise place.error(f"no '{key}'{inside}; it has {names(record)}")
    if not isinstance(record[key], kind):
        what = {str: "text", list: "a list", dict: "an object"}[kind]
        raise place.error(f"'{key}'{inside} must be {what}, is {shown(record[key])}")
    return record[key]


def tokens(place: Place, label: str, value: Any) -> int:
    """A token count, an integer from 1 to `MOST_TOKENS`, from JSON or the text of a CSV cell."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise place.error(
            f"{label} must be a whole number of tokens from 1 to {MOST_TOKENS}, is {shown(value)}; correct or drop it"
        )
    return value


def number(place: Place, label: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, from JSON or the text of a CSV cell."""
    try:
        result = math.nan if isinstance(value, bool | list | dict | None) else float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not (math.isfinite(result) and low <= result <= high):
        bounds = {(0.0, math.inf): ", 0 or more", (0.0, 1.0): " from 0 to 1"}.get((low, high), "")
        raise place.error(f"{label} must be a finite number{bounds}, is {shown(value)}; correct or drop it")
    return result
