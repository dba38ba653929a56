"""Results of a suite: a folder with a file for each finished part, and the results file that others can add to.

docs/suite.md has the format of a results file. A file with one column of one's own is a results file too.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.errors import UserError, require_known
from jaxroute.evaluation.statistics import Interval, mean_interval, paired_difference
from jaxroute.files import read_json, write_text
from jaxroute.runs.run_folder import versions, writable_folder
from jaxroute.suites.description import SUITES, Column, Suite

STAMP, RESULTS = "suite.json", "results.json"
_SETS = ("evaluation", "short")


class Results(NamedTuple):
    """What is known of a suite."""

    suite: Suite
    best_rule: dict[str, str]  # environment -> the column of its best rule
    columns: dict[str, Column]

    def qos(self, column: str, environment: str, kind: str = "evaluation") -> np.ndarray | None:
        """float64 [episodes], the mean over the runs of a column; None if it has no results there."""
        runs = self.columns.get(column, {}).get(environment, {}).get(kind)
        return None if runs is None else np.mean(runs, axis=0)

    def mean(self, column: str, environment: str, kind: str = "evaluation") -> Interval | None:
        """The mean QoS over episodes and runs, with its interval over episodes."""
        qos = self.qos(column, environment, kind)
        return None if qos is None else mean_interval(qos)

    def lead(self, column: str, environment: str) -> Interval | None:
        """QoS less that of the best rule, with its paired interval over episodes; the mean over the runs."""
        qos, rule = self.qos(column, environment), self.qos(self.best_rule.get(environment, ""), environment)
        return None if qos is None or rule is None else paired_difference(qos, rule)

    def worst_lead(self, column: str, environment: str) -> float | None:
        """The lead of the worst run."""
        rule = self.qos(self.best_rule.get(environment, ""), environment)
        runs = self.columns.get(column, {}).get(environment, {}).get("evaluation")
        return None if runs is None or rule is None else float(np.mean(runs, axis=1).min() - rule.mean())

    def share(self, column: str, environment: str) -> float | None:
        """The part of the gap between the best rule and the ceiling that a column closes; None without a gap."""
        names = column, self.best_rule.get(environment, ""), "ceiling"
        own, rule, ceiling = (self.qos(name, environment, "short") for name in names)
        if own is None or rule is None or ceiling is None or ceiling.mean() <= rule.mean():
            return None
        return float((own.mean() - rule.mean()) / (ceiling.mean() - rule.mean()))

    def with_columns(self, others: dict[str, Column]) -> Self:
        """With further columns, or newer ones of the same names. Raises `UserError` for a name of the suite's own."""
        for name in others:
            if name in self.suite.columns:
                raise UserError(f"column {name} is one of {self.suite.name}'s own; give yours another name")
        return self._replace(columns=self.columns | others)

    def write(self, path: Path) -> None:
        """Writes a results file."""
        tree = {
            "suite": self.suite.name,
            "dynamics_version": DYNAMICS_VERSION,
            "versions": versions(),
            "best_rule": self.best_rule,
            "columns": self.columns,
        }
        write_text(path, json.dumps(tree) + "\n")


def read_results(path: Path, suite: Suite | None = None) -> Results:
    """The content of a results file, which must be of `suite`, if it is given.

    Raises:
        UserError: the file cannot be read, is of another suite or dynamics version, or has not the numbers that the
            suite's episodes give.
    """
    tree = read_json(path)
    if not isinstance(tree, dict) or not {"suite", "dynamics_version", "columns"} <= tree.keys():
        raise UserError(f"{path}: not results of a suite: it needs suite, dynamics_version and columns (docs/suite.md)")
    own = SUITES[require_known(tree["suite"], SUITES, "suite", f"{path}: ")]
    if suite is not None and own != suite:
        raise UserError(f"{path}: has results of {own.name}, not of {suite.name}; give results of one suite")
    if tree["dynamics_version"] != DYNAMICS_VERSION:
        raise UserError(
            f"{path}: has results of dynamics version {tree['dynamics_version']}, this package has {DYNAMICS_VERSION}; "
            "evaluate the router again with this package"
        )
    columns = _mapping(f"{path}: columns", tree["columns"])
    for name, column in columns.items():
        for environment, sets in _mapping(f"{path}: columns.{name}", column).items():
            where = f"{path}: columns.{name}.{environment}"
            require_known(environment, own.environments, "environment", f"{where}: ")
            for kind, runs in _mapping(where, sets).items():
                require_known(kind, _SETS, "set of episodes", f"{where}: ")
                _check_runs(f"{where}.{kind}", runs, getattr(own, kind).number)
    best = _mapping(f"{path}: best_rule", tree.get("best_rule", {}))
    for environment, name in best.items():
        require_known(environment, own.environments, "environment", f"{path}: best_rule: ")
        require_known(name, ("index_rule", "best_other_rule"), "column", f"{path}: best_rule.{environment}: ")
    return Results(own, best, columns)


def _mapping(where: str, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must be a mapping (docs/suite.md)")
    return tree


def _check_runs(where: str, runs: Any, episodes: int) -> None:
    whole = isinstance(runs, list) and runs and all(isinstance(run, list) and len(run) == episodes for run in runs)
    if not whole or not all(
        isinstance(qos, int | float) and not isinstance(qos, bool) and math.isfinite(qos) for run in runs for qos in run
    ):
        raise UserError(f"{where}: must be a list of runs, each a list of the QoS of {episodes} episodes")


class SuiteFolder:
    """The folder of a suite. Each finished part is a file, written whole, and is not computed again."""

    def __init__(self, path: Path, suite: Suite, configuration: str):
        """Creates the folder, or opens that of an earlier start. `configuration` identifies what is trained.

        Raises:
            UserError: the folder cannot be written, or holds something else.
        """
        self.path, self._suite, self._parts = path, suite, path / "parts"
        entries = writable_folder(path)
        stamp = {"suite": suite.digest, "dynamics_version": DYNAMICS_VERSION, "configuration": configuration}
        file = path / STAMP
        if not file.is_file():
            if not all(entry.name.startswith(".") for entry in entries):
                raise UserError(f"--out {path}: holds something else; name a new folder, or empty this one")
            write_text(file, json.dumps(stamp, indent=2) + "\n")
            return
        old = _mapping(str(file), read_json(file))
        whose = {
            "suite": "of another suite, or version of it",
            "dynamics_version": f"of dynamics version {old.get('dynamics_version')} (this package: {DYNAMICS_VERSION})",
            "configuration": "of another default configuration",
        }
        for key, what in whose.items():
            if old.get(key) != stamp[key]:
                raise UserError(f"--out {path}: holds results {what}; name a new folder")

    def part(self, environment: str, name: str) -> dict[str, Any] | None:
        """A finished part, or None."""
        path = self._part(environment, name)
        return read_json(path) if path.is_file() else None

    def finish(self, environment: str, name: str, part: dict[str, Any]) -> None:
        """Writes a part."""
        path = self._part(environment, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(part, allow_nan=False) + "\n")

    def results(self) -> Results:
        """All finished parts, and the columns that were added to the results file."""
        suite, best, columns = self._suite, {}, {}
        for environment in suite.environments:
            rules = self.part(environment, "rules")
            if rules is not None:
                best[environment] = rules["best_rule"]
            for column in suite.columns:
                names = [f"{column}-{seed}" for seed in suite.seeds] if column in suite.trained else [column]
                found = [part for name in names if (part := self.part(environment, name)) is not None]
                if found:
                    columns.setdefault(column, {})[environment] = _joined(part["qos"] for part in found)
        results = Results(suite, best, columns)
        earlier = self.path / RESULTS
        if earlier.is_file():
            added = read_results(earlier, suite).columns
            results = results.with_columns({name: added[name] for name in added if name not in suite.columns})
        return results

    def _part(self, environment: str, name: str) -> Path:
        return self._parts / environment / f"{name}.json"


def _joined(parts: Iterable[dict[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    """The runs of all parts, by set of episodes."""
    joined: dict[str, list[list[float]]] = {}
    for part in parts:
        for kind, runs in part.items():
            joined.setdefault(kind, []).extend(runs)
    return joined
