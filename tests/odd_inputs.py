"""Random mutations of a valid file of requests, each with what must come of it: certain figures, or a refusal."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.request_files import REQUESTS, Example, Request, Row

ANY = "either"  # refused, or read with the figures


class Odd(NamedTuple):
    """A mutated file. `figures` (ms, prompt, output tokens of each request) is None where it must be refused."""

    what: str
    content: bytes
    figures: list[tuple[float, int, int]] | None
    outcome: str = ""  # ANY: a refusal is right too
    says: str = ""  # the reading's changes or warnings must say this


def figures(requests: list[Request]) -> list[tuple[float, int, int]]:
    """What is read from requests."""
    begin = min(request.time for request in requests)
    return sorted(((r.time - begin, r.prompt, r.output) for r in requests), key=lambda row: row[0])


def _write(example: Example, rows: list[Row]) -> bytes:
    return example.text(rows).encode()


def cut(example: Example, rng: np.random.Generator) -> Odd:
    """The file ends early, at any byte."""
    whole = _write(example, example.rows())
    content = whole[: int(rng.integers(1, len(whole)))]
    if example.kind == "document":
        return Odd("cut", content, None)
    lines = content.decode().split("\n")
    complete = len(lines) - 1 - (example.kind == "csv")
    if complete < 0 or (complete == 0 and lines[-1] == ""):
        return Odd("cut", content, None)
    if lines[-1] == "":
        return Odd("cut between lines", content, figures(REQUESTS[:complete]))
    # A last row that looks whole may have lost digits: then the reading says what it assumed.
    return Odd("cut in a line", content, figures(REQUESTS[: complete + 1]), ANY, "no line end")


def columns_reordered(example: Example, rng: np.random.Generator) -> Odd:
    """Columns or keys in another order."""
    rows = example.rows()
    order = [list(rows[0])[index] for index in rng.permutation(len(rows[0]))]
    return Odd(
        "columns reordered", _write(example, [{key: row[key] for key in order} for row in rows]), figures(REQUESTS)
    )


def rows_reordered(example: Example, rng: np.random.Generator) -> Odd:
    """Two rows exchanged."""
    rows = example.rows()
    a, b = rng.choice(len(rows), 2, replace=False)
    rows[a], rows[b] = rows[b], rows[a]
    return Odd("rows reordered", _write(example, rows), None if example.ordered else figures(REQUESTS))


def row_twice(example: Example, rng: np.random.Generator) -> Odd:
    """A row twice: a request of its own, unless it has an id."""
    at = int(rng.integers(len(REQUESTS)))
    rows = example.rows()
    rows.insert(at, rows[at])
    both = figures([*REQUESTS[:at], REQUESTS[at], *REQUESTS[at:]])
    return Odd("row twice", _write(example, rows), None if example.identity else both)


def column_twice(example: Example, rng: np.random.Generator) -> Odd:
    """A needed column or key twice, with other values."""
    name = str(rng.choice([example.time, example.prompt, example.output]))
    text = example.text(example.rows())
    if example.kind == "csv":
        lines = text.splitlines()
        head = f"{lines[0]},{name}"
        return Odd("column twice", "\n".join([head, *(f"{line},7" for line in lines[1:])]).encode(), None)
    last = name.split(".")[-1]
    return Odd("key twice", text.replace(f'"{last}":', f'"{last}": 7, "{last}":').encode(), None)


def column_missing(example: Example, rng: np.random.Generator) -> Odd:
    """A needed column or key missing, everywhere or in one row."""
    name = str(rng.choice([example.time, example.prompt, example.output]))
    rows = example.rows()
    everywhere = example.kind == "csv" or rng.random() < 0.5
    for row in rows if everywhere else [rows[int(rng.integers(len(rows)))]]:
        del row[name]
    return Odd(f"{name} missing", _write(example, rows), None)


def column_empty(example: Example, rng: np.random.Generator) -> Odd:
    """A needed column without values."""
    name = str(rng.choice([example.time, example.prompt, example.output]))
    empty = "" if example.kind == "csv" else rng.choice([None, ""])  # type: ignore[arg-type]
    return Odd(f"{name} empty", _write(example, [{**row, name: empty} for row in example.rows()]), None)


BAD_TOKENS = ["", "many", "1.5", -3, 10**18, "1e3", "0x10", "１２", "1_0", "1 2", float("nan"), "--", "1;2"]
BAD_TIMES = [
    "",
    "noon",
    "nan",
    "inf",
    "-inf",
    "1e400",
    1e30,
    "１２",
    "1_0",
    "12:30",
    "0x1F",
    "1;2",
    "2023-99-99 00:00:00",
]
BAD_JSON = [None, True, [], {}, [1], {"value": 1}]


def bad_value(example: Example, rng: np.random.Generator) -> Odd:
    """One cell with a value that cannot be meant."""
    name = str(rng.choice([example.time, example.prompt, example.output]))
    bad = BAD_TIMES if name == example.time else BAD_TOKENS
    values = bad if example.kind == "csv" else [*bad, *BAD_JSON]
    value = values[int(rng.integers(len(values)))]
    rows = example.rows()
    rows[int(rng.integers(len(rows)))][name] = value
    return Odd(f"{name} is {value!r:.30}", _write(example, rows), None)


def no_answer(example: Example, rng: np.random.Generator) -> Odd:
    """A request without output tokens: a failure in some formats, else refused."""
    rows, at = example.rows(), int(rng.integers(1, len(REQUESTS)))
    rows[at][example.output] = 0
    left = figures([*REQUESTS[:at], *REQUESTS[at + 1 :]])
    return Odd("no output tokens", _write(example, rows), left if example.failed else None)


def other_unit(example: Example, rng: np.random.Generator) -> Odd:
    """All times in a unit a thousand times smaller or larger than the format's: read as written, with a warning."""
    if not example.scalable:
        rows = [{**row, example.time: 1000 * index} for index, row in enumerate(example.rows())]
        return Odd("numbers for dates", _write(example, rows), None)
    small = bool(rng.random() < 0.5)
    rows, scale = example.rows(), 1e-3 if small else 1e3
    for row in rows:
        row[example.time] = row[example.time] * scale
    if example.name == "aiperf":
        return Odd("other unit", _write(example, rows), None)  # its nanoseconds are whole numbers
    scaled = [(time * scale, prompt, output) for time, prompt, output in figures(REQUESTS)]
    clock = example.name in ("jaxroute serve", "LLMServingSim", "guidellm")
    if clock and not small:
        return Odd("other unit", _write(example, rows), None)  # beyond the year 5138
    said = "requests/s; were they sent at once" if small else "one request every"
    return Odd("other unit", _write(example, rows), scaled, "", said)


def column_more(example: Example, rng: np.random.Generator) -> Odd:
    """A further column or key, which is ignored."""
    rows = [{"note": "", **row, "extra": int(rng.integers(100))} for row in example.rows()]
    return Odd("a column more", _write(example, rows), figures(REQUESTS))


def garbage(example: Example, rng: np.random.Generator) -> Odd:
    """A line of something else in the middle."""
    lines = example.text(example.rows()).split("\n")
    line = str(
        rng.choice(["<html>", "Traceback (most recent call last):", '"', "{", "[1, 2", ",,,,,,,,,,", "a,b\tc", "{}"])
    )
    lines.insert(int(rng.integers(1, len(lines))) if len(lines) > 2 else 1, line)
    return Odd(f"line {line!r}", "\n".join(lines).encode(), None)


def encoding(example: Example, rng: np.random.Generator) -> Odd:
    """Another encoding of the same text: some are UTF-8 and read, others refused."""
    text = example.text(example.rows())
    whole = figures(REQUESTS)
    kinds: list[Callable[[], Odd]] = [
        lambda: Odd("byte order mark", text.encode("utf-8-sig"), whole),
        lambda: Odd("CR LF", text.replace("\n", "\r\n").encode(), whole),
        lambda: Odd("blank lines", text.replace("\n", "\n\n  \n").encode(), whole),
        lambda: Odd("gzip", gzip.compress(text.encode()), whole),
        lambda: Odd("gzip, mark, CR LF", gzip.compress(text.replace("\n", "\r\n").encode("utf-8-sig")), whole),
        lambda: Odd("cut gzip", gzip.compress(text.encode())[: -int(rng.integers(5, 60))], None),
        lambda: Odd("damaged gzip", _damaged(gzip.compress(text.encode()), rng), None),
        lambda: Odd("UTF-16", text.encode("utf-16"), None),
        lambda: Odd("UTF-16 without mark", text.encode("utf-16-le"), None),
        lambda: Odd("UTF-32", text.encode("utf-32"), None),
        lambda: Odd("Latin-1", text.encode() + "é\n".encode("latin-1"), None),
        lambda: Odd("NUL", text.replace("2", "\0", 1).encode(), None),
        lambda: Odd("zip", b"PK\x03\x04" + text.encode(), None),
        lambda: Odd("nothing", b"", None),
        lambda: Odd("white space", b" \n\t\n", None),
    ]
    return kinds[int(rng.integers(len(kinds)))]()


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(20, len(content) - 8))
    return content[:at] + bytes([content[at] ^ 0x5A]) + content[at + 1 :]


def separator(example: Example, rng: np.random.Generator) -> Odd:
    """CSV with other separators or quotes; JSON laid out otherwise."""
    text = example.text(example.rows())
    if example.kind == "csv":
        mark = str(rng.choice([";", "\t", "|", "quoted"]))
        if mark != "quoted":
            return Odd(f"separator {mark!r}", text.replace(",", mark).encode(), None)
        quoted = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())
        return Odd("quoted", quoted.encode() + b"\n", figures(REQUESTS))
    if example.kind == "document":
        return Odd("indented", json.dumps(json.loads(text), indent=int(rng.integers(4))).encode(), figures(REQUESTS))
    listed = [json.loads(line) for line in text.splitlines()]
    return Odd("a list", json.dumps(listed, indent=int(rng.integers(1, 4))).encode(), figures(REQUESTS))


MUTATIONS = (
    cut, columns_reordered, rows_reordered, row_twice, column_twice, column_missing, column_empty, bad_value, bad_value,
    bad_value, no_answer, other_unit, column_more, garbage, encoding, encoding, separator,
)  # fmt: skip


def odd_inputs(example: Example, count: int, seed: int) -> list[Odd]:
    """`count` random mutations of the example."""
    rng = np.random.default_rng(seed)
    return [MUTATIONS[int(rng.integers(len(MUTATIONS)))](example, rng) for _ in range(count)]
