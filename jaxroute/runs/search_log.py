"""The log of the search for a start, from which a run that was stopped or killed goes on with it."""

import json
from contextlib import ExitStack
from pathlib import Path

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
        lines = _whole_lines(path)
        self.known = [json.loads(line)["values"] for line in lines]
        write_text(path, "".join(line + "\n" for line in lines))
        self._lines = self.enter_context(path.open("a", encoding="utf-8"))

    def write(self, decisions: int, qos: float, values: np.ndarray) -> None:
        """Logs a generation: decisions so far, its mean QoS, and the value of each of its policies, float32 [P]."""
        record = {"decisions": decisions, "qos": round(qos, 4), "values": values.tolist()}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()


def _whole_lines(path: Path) -> list[str]:
    """The lines before the first damaged one of a file, which may be missing."""
    lines: list[str] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)["values"]
            np.asarray(values, np.float32).reshape(len(values))
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line.decode())
    return lines
