"""Ranks trials by the QoS of their evaluation, averaged over seeds."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxroute.evaluation.statistics import CONFIDENCE


class Ranked(NamedTuple):
    """The result of a trial after the last rung that it reached."""

    trial: int
    rung: int
    frames: int
    qos: float  # mean over seeds
    half_width: float  # half of its 95 % interval (`SeedNoise`)


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
