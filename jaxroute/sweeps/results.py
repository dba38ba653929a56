"""The results of a sweep: a folder with one file per finished batch, the table computed from them, and its ranking."""

import csv
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxroute.errors import UserError
from jaxroute.evaluation.statistics import CONFIDENCE
from jaxroute.files import whole_file, write_text
from jaxroute.runs.run_folder import versions, writable_folder
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
TRAINED = ("qos", "reward", "return", "entropy", "alpha")  # metrics of `Trainer`, means over the last tenth of a rung


class SweepFolder:
    """The folder of a sweep. Files are written atomically, so they are complete even if the sweep is killed."""

    def __init__(self, path: Path, spec: Spec):
        """Creates the folder, or opens that of an earlier start of the same spec.

        Raises:
            UserError: the folder cannot be written, or contains something else.
        """
        self.path, self._spec = path, spec
        self._parts, self.work = path / "parts", path / "work"
        entries = writable_folder(path)
        digest = hashlib.sha256(spec.text.encode()).hexdigest()
        stamp = path / "sweep.json"
        if not stamp.is_file():
            if not all(entry.name.startswith(".") for entry in entries):
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

    def finished(self, batch: Batch) -> bool:
        """Whether `finish` has written the result of a batch."""
        return self._part(batch).is_file()

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
                points = zip(part["frames"], np.array(curve, float).tolist(), strict=True)
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
    seconds: float,
) -> dict[str, Any]:
    """The results of a batch: rows of the table, and the learning curves.

    `frames` [C] are the frames after each chunk of the rung, `history` has metrics of `Trainer` [C, rows], `evaluation`
    has metrics of fresh episodes [rows, episodes], and `seconds` is the time of the batch.
    """
    rows, installed = [], versions()
    for index, (number, seed) in enumerate(batch.rows):
        trained = {name: values[:, index] for name, values in history.items()}
        # There is no loss before the first update.
        diverged = not np.isfinite(trained["mean_q"] + trained["critic_loss"])[trained["updates"] > 0].all()
        last = slice(-max(1, len(frames) // 10), None)
        measured = {name: _number(evaluation[name][index].mean()) for name in EVALUATED}
        rows.append(
            {
                "trial": number,
                "seed": seed,
                "rung": batch.rung,
                "frames": frames[-1],
                "group": batch.group,
                **spec.trials[number].values,
                "diverged": diverged,
                **{name: None if diverged else value for name, value in measured.items()},
                **{f"train_{name}": _number(trained[name][last].mean()) for name in TRAINED},
                "seconds": seconds / len(batch.rows),
                **{name: installed[name] for name in ("jaxroute", "jax", "python", "device")},
            }
        )
    curves = [[_number(qos) for qos in history["qos"][:, index]] for index in range(len(batch.rows))]
    return {"rows": rows, "frames": frames, "curves": curves}


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; remove it, and the same command runs that batch again") from None


class Ranked(NamedTuple):
    """The result of a trial after the last rung that it reached."""

    trial: int
    rung: int
    frames: int
    qos: float  # mean over seeds
    half_width: float  # half of its 95 % interval (`SeedNoise`)

    @property
    def text(self) -> str:
        """The QoS, with its interval if there is one."""
        return f"{self.qos:.4f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.4f}")


class SeedNoise(NamedTuple):
    """The variation of QoS with the seed: the standard deviation within trials, pooled over the trials of a rung.

    It is pooled because a trial has few seeds: from two seeds alone, the interval would exceed the range of QoS.
    """

    deviation: float
    freedom: int  # degrees of freedom

    def half_width(self, trainings: int) -> float:
        """Half of the 95 % interval of a mean over `trainings`; NaN if every trial has one seed."""
        if not self.freedom:
            return math.nan
        return float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2) * self.deviation / math.sqrt(trainings))


def seed_noise(rows: list[dict[str, Any]]) -> SeedNoise:
    """Computes it from the rows of one rung, without diverged trainings."""
    groups = [np.array(values) for values in _qos(rows).values()]
    squares, freedom = sum(len(qos) * qos.var() for qos in groups), sum(len(qos) - 1 for qos in groups)
    return SeedNoise(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


def ranking(rows: list[dict[str, Any]]) -> list[Ranked]:
    """Trials of the table `rows` from best to worst; later rungs are first, and diverged trials are left out."""
    ranked: dict[int, Ranked] = {}
    for rung in sorted({row["rung"] for row in rows}):
        reached = [row for row in rows if row["rung"] == rung]
        noise = seed_noise(reached)
        for trial in {row["trial"] for row in reached}:
            ranked.pop(trial, None)
        for trial, qos in _qos(reached).items():
            half_width = noise.half_width(len(qos))
            ranked[trial] = Ranked(trial, rung, reached[0]["frames"], float(np.mean(qos)), half_width)
    return sorted(ranked.values(), key=lambda trial: (-trial.rung, -trial.qos, trial.trial))


def survivors(rows: list[dict[str, Any]], rung: int, keep: float) -> list[int]:
    """The trials that continue after `rung`, in order: the best share `keep` of those that reached it, rounded up."""
    reached = [row for row in rows if row["rung"] == rung]
    count = survivor_count(len({row["trial"] for row in reached}), keep)
    return sorted(trial.trial for trial in ranking(reached)[:count])


def survivor_count(trials: int, keep: float) -> int:
    """How many of the `trials` that reached a rung go on at most; fewer do where too many of them diverged."""
    return math.ceil(keep * trials)


def _qos(rows: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Trial -> QoS of its seeds, without trials that diverged with any seed."""
    diverged = {row["trial"] for row in rows if row["diverged"]}
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["trial"] not in diverged:
            values.setdefault(row["trial"], []).append(row["qos"])
    return values
