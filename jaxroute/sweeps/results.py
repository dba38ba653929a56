"""The results of a sweep: a folder with one file per finished batch, and the table computed from them."""

import csv
import hashlib
import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.files import whole_file, write_text
from jaxroute.sweeps.plan import Batch
from jaxroute.sweeps.spec import Spec

TABLE = "results"
EVALUATED = (  # metrics of `environment.metrics.summarize`, means over the episodes of the evaluation
    "qos",
    "score",
    "latency_per_token",
    "ttft",
    "tpot",
    "violation_rate",
    "drop_rate",
    "rejection_rate",
    "preemptions",
    "kv_use",
    "utilization",
    "qos_per_busy_second",
)


class SweepFolder:
    """The folder of a sweep. Files are written atomically, so they are complete even if the sweep is killed."""

    def __init__(self, path: Path, spec: Spec):
        """Creates the folder, or opens that of an earlier start of the same spec.

        Raises:
            UserError: the folder cannot be written, or contains something else.
        """
        self.path, self._spec = path, spec
        self._parts, self.work = path / "parts", path / "work"
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another folder") from None
        digest = hashlib.sha256(spec.text.encode()).hexdigest()
        stamp = path / "sweep.json"
        if not stamp.is_file():
            if any(entry for entry in path.iterdir() if not entry.name.startswith(".")):
                raise UserError(f"--out {path}: holds something else; name a new folder, or empty this one")
            write_text(stamp, json.dumps({"spec": digest}) + "\n")
        elif _read_json(stamp) != {"spec": digest}:
            raise UserError(f"--out {path}: holds the results of another spec; name a new folder, or restore that spec")
        self._parts.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)

    def sizes(self, choose: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Trainings per batch by group, and the number of devices: those of the first start, or `choose()`.

        They are stored because another size changes the last bits of the results.
        """
        path = self.path / "sizes.json"
        if not path.is_file():
            write_text(path, json.dumps(choose(), indent=2) + "\n")
        return _read_json(path)

    def finished(self, batch: Batch) -> dict[str, Any] | None:
        """The result of a batch that `finish` wrote, or None."""
        path = self._part(batch)
        return _read_json(path) if path.is_file() else None

    def finish(self, batch: Batch, part: dict[str, Any]) -> None:
        """Writes the results of a batch, and updates the table."""
        write_text(self._part(batch), json.dumps(part, allow_nan=False) + "\n")
        self.write_table()

    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per training and rung, ordered by rung, trial and seed."""
        rows = [row for path in self._parts.glob("*.json") for row in _read_json(path)["rows"]]
        return sorted(rows, key=lambda row: (row["rung"], row["trial"], row["seed"]))

    def curves(self) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """(trial, seed) -> (frames, QoS in training) of each chunk of all rungs."""
        curves: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for path in self._parts.glob("*.json"):
            part = _read_json(path)
            for row, curve in zip(part["rows"], part["curves"], strict=True):
                points = [
                    (frames, math.nan if qos is None else qos)
                    for frames, qos in zip(part["frames"], curve, strict=True)
                ]
                curves.setdefault((row["trial"], row["seed"]), []).extend(points)
        return {key: sorted(points) for key, points in curves.items()}

    def write_table(self) -> None:
        """Writes `results.csv`, and `results.parquet` if pyarrow is installed."""
        rows = [{name: _cell(value) for name, value in row.items()} for row in self.rows()]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / f"{TABLE}.csv", text.getvalue())
        if importlib.util.find_spec("pyarrow") is not None:
            import pyarrow
            import pyarrow.parquet

            with whole_file(self.path / f"{TABLE}.parquet") as temporary:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)

    def _part(self, batch: Batch) -> Path:
        return self._parts / f"{batch.name}.json"


def make_part(
    spec: Spec,
    batch: Batch,
    frames: list[int],
    history: dict[str, np.ndarray],
    evaluation: dict[str, np.ndarray],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """The results of a batch: rows of the table, and the learning curves.

    `frames` [C] are the frames after each chunk of the rung, `history` has metrics of `Trainer` [C, rows], `evaluation`
    has metrics of fresh episodes [rows, episodes], and `origin` has further columns of each row.
    """
    rows = []
    for index, (number, seed) in enumerate(batch.rows):
        trained = {name: values[:, index] for name, values in history.items()}
        # There is no loss before the first update.
        diverged = not np.isfinite(trained["mean_q"] + trained["critic_loss"])[trained["updates"] > 0].all()
        last = slice(-max(1, len(frames) // 10), None)
        measured = {name: float(evaluation[name][index].mean()) for name in EVALUATED}
        rows.append(
            {
                "trial": number,
                "seed": seed,
                "rung": batch.rung,
                "frames": frames[-1],
                "group": batch.group,
                **spec.trials[number].values,
                "diverged": diverged,
                **{name: None if diverged or not math.isfinite(value) else value for name, value in measured.items()},
                **{
                    f"train_{name}": _mean(trained[name][last])
                    for name in ("qos", "reward", "return", "entropy", "alpha")
                },
                **origin,
            }
        )
    curves = [[_number(qos) for qos in history["qos"][:, index]] for index in range(len(batch.rows))]
    return {"rows": rows, "frames": frames, "curves": curves}


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean())


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; remove it, and the same command runs that batch again") from None
