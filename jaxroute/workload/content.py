"""A file of requests as rows, whatever holds them: CSV, JSON objects one a line, or a JSON document."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jaxroute.errors import UserError
from jaxroute.workload.files import (
    Place,
    csv_cells,
    csv_row,
    json_object,
    json_reason,
    names,
    parse_json,
    read_ended_lines,
    shown,
)
from jaxroute.workload.reading import Tally

_Lines = Iterator[tuple[Place, str, bool]]


@dataclass
class Content:
    """The rows of a file, to be read once. `keys` are the columns of CSV, or the keys of the first object."""

    path: Path
    kind: str  # csv, or json
    keys: Sequence[str]
    head: Place  # of the header or of the first object
    first: dict[str, Any]  # the first object; empty for CSV
    tally: Tally
    _lines: _Lines  # of CSV, behind the header
    _objects: Iterator[tuple[Place, dict[str, Any]]]

    def objects(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """The JSON objects."""
        for place, record in self._objects:
            self.tally.rows += 1
            yield place, record

    def rows(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[Place, list[Any]]]:
        """The values of `columns`, which `keys` has, and of `optional` ones, None where a row lacks them."""
        wanted = [*columns, *optional]
        if self.kind == "csv":
            twice = [name for name in wanted if list(self.keys).count(name) > 1]
            if twice:
                raise self.head.error(f"column {shown(twice[0])} twice; keep one of them")
            at = [self.keys.index(name) for name in wanted]
            width = len(self.keys)
            for place, line, ended in self._lines:
                cells = csv_row(place, line, width)
                self.tally.rows += 1
                if not ended:
                    self.tally.changed.append("the last row has no line end and is taken as whole")
                yield place, [cells[index] for index in at]
            return
        for place, record in self.objects():
            missing = [name for name in columns if name not in record]
            if missing:
                raise place.error(f"no {names(missing)}; it has {names(record)}")
            yield place, [record.get(name) for name in wanted]


def open_content(path: Path) -> Content:
    """The rows of a file, recognised by its first line. Raises `UserError` for an empty file or one without any."""
    tally = Tally()
    lines = read_ended_lines(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: the file is empty; a trace needs a row for each request")
    place, line, _ = first
    if line[0] not in "{[":
        keys = csv_cells(place, line)
        return Content(path, "csv", keys, place, {}, tally, lines, iter(()))
    try:
        record = parse_json(line)
    except ValueError as error:
        objects = _document(path, first, lines, error)
    else:
        objects = _listed(path, place, record) if isinstance(record, list) else _by_line(place, record, lines)
    head, record = next(objects)
    return Content(path, "json", tuple(record), head, record, tally, iter(()), chain([(head, record)], objects))


def _by_line(place: Place, first: dict[str, Any], lines: _Lines) -> Iterator[tuple[Place, dict[str, Any]]]:
    yield place, first
    for place, line, _ in lines:
        yield place, json_object(place, line)


def _document(
    path: Path, first: tuple[Place, str, bool], lines: _Lines, problem: ValueError
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """A JSON document of several lines; otherwise the error of its first line, which then should be a whole object."""
    whole = [first, *lines]
    try:
        record = parse_json("\n".join(line for _, line, _ in whole))
    except ValueError as error:
        # A first line of a bracket or two begins a document; of others it is likelier that the line itself is wrong.
        reason, place = (error, first[0]) if len(first[1]) < 3 and len(whole) > 1 else (problem, first[0])
        if reason is error and isinstance(error, json.JSONDecodeError):
            place = whole[error.lineno - 1][0]
        raise place.error(f"not JSON ({json_reason(reason)}); write one JSON object a line") from None
    return _listed(path, first[0], record) if isinstance(record, list) else iter([(first[0], record)])


def _listed(path: Path, place: Place, record: list[Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    if not record or not all(isinstance(item, dict) for item in record):
        raise place.error(f"not a JSON object but {shown(record)}; write one JSON object a line")
    return iter([(Place(path, index, "entry"), item) for index, item in enumerate(record)])
