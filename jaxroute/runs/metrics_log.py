"""Logs the metrics of a training to `metrics.jsonl` and to the loggers that the configuration names."""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jaxroute.files import write_text
from jaxroute.runs.loggers import SINKS


class MetricsLog(ExitStack):
    """Writes one line of `metrics.jsonl` per chunk of training, and sends the same metrics to loggers.

    Use it as a context manager. Each line is passed to the operating system at once, so a kill loses none.
    """

    kept: list[dict[str, Any]]
    """The records that an earlier process logged, up to the frames from which the run continues."""

    def __init__(self, run: Path, loggers: Sequence[str], config: dict[str, Any], frames: int = 0):
        """`loggers` are names in `loggers.SINKS`; `config` is the configuration by dotted keys, for their parameters.

        `frames` is the number of frames that a resumed run has done. Later and damaged lines are removed.
        Raises `UserError` if a logger cannot be used.
        """
        super().__init__()
        path = run / "metrics.jsonl"
        with ExitStack() as stack:
            self._sinks = [stack.enter_context(SINKS[name](run, config, frames)) for name in loggers]
            self.kept = _whole_records(path, frames)
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
            self._lines = stack.enter_context(path.open("a", encoding="utf-8"))
            self.push(stack.pop_all())

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Logs `record`: "frames" and metrics with one level of nesting. Returns it with None instead of NaN."""
        record = _finite(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        leaves = jax.tree.leaves_with_path(record)  # without None
        scalars = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in leaves}
        for sink in self._sinks:
            sink.write(scalars, record["frames"])
        return record


def _whole_records(path: Path, frames: int) -> list[dict[str, Any]]:
    """The records up to `frames` in the file, which may be missing or incomplete."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            if record["frames"] <= frames:
                records.append(record)
        except (ValueError, TypeError, KeyError):
            continue
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None
