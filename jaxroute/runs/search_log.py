"""The log of the search for a start, from which a run that was stopped or killed goes on with it."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.files import write_text


class SearchLog(ExitStack):
    """Writes one line of `search.jsonl` per generation. Use it as a context manager.

    Each line is passed to the operating system at once, so a kill loses none.
    """

    known: list[list[float]]
    """The values of the generations that an earlier process logged."""

    def __init__(self, run: Path):
        """The lines before the first damaged one are kept."""
        super().__init__()
        path = run / "search.jsonl"
        records = _whole_records(path)
        self.known = [record["values"] for record in records]
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self._lines = self.enter_context(path.open("a", encoding="utf-8"))

    def write(self, decisions: int, qos: float, values: np.ndarray) -> None:
        """Logs a generation: decisions so far, its mean QoS, and the value of each of its policies, float32 [P]."""
        record = {"decisions": decisions, "qos": round(qos, 4), "values": values.tolist()}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()


def _whole_records(path: Path) -> list[dict[str, Any]]:
    """The records before the first damaged line of a file, which may be missing."""
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
