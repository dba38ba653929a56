"""Writes the evaluations of each question as CSV and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.jobs import METRICS, read_evaluation
from benchmarks.paper.plan import Question, Setting
from jaxroute.evaluation.statistics import Interval, mean_interval, paired_difference
from jaxroute.files import write_text
from jaxroute.routers import ROUTER_LABELS

POLICY_LABELS = {
    "trained": "Trained",
    "baseline_rl": "Baseline RL",
    "specialist": "Trained for this rate alone",
    "trained_with_3_experts": "Trained with 3 experts",
    "trained_on_vllm_v1": "Trained on vLLM V1",
    "trained_on_trace": "Trained on the trace",
}

Results = dict[str, list[dict[str, list[float]]]]


def label_of(name: str) -> str:
    """The label of a router or policy in tables and pictures."""
    return POLICY_LABELS.get(name) or ROUTER_LABELS[name]


def per_episode(rows: list[dict[str, list[float]]], metric: str = "qos") -> np.ndarray:
    """The mean over seeds, [episodes]."""
    return np.mean([row[metric] for row in rows], axis=0)


def interval(rows: list[dict[str, list[float]]], metric: str = "qos") -> Interval:
    """Mean and 95 % interval: over the seeds if there are several, otherwise over the episodes."""
    if len(rows) > 1:
        return mean_interval(np.array([np.mean(row[metric]) for row in rows]))
    return mean_interval(np.asarray(rows[0][metric]))


def lead(results: Results, name: str, other: str, metric: str = "qos") -> Interval:
    """The lead of `name` over `other`, paired by episode."""
    return paired_difference(per_episode(results[name], metric), per_episode(results[other], metric))


def write_csv(path: Path, out: Path, question: Question) -> None:
    """Writes one row per point, router, seed and episode."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([question.axis, "router", "seed", "episode", *METRICS])
    for setting in question.settings:
        for router, rows in read_evaluation(out, setting).items():
            for seed, row in enumerate(rows):
                for episode, values in enumerate(zip(*(row[metric] for metric in METRICS), strict=True)):
                    figures = [f"{value:.6g}" for value in values]
                    writer.writerow([setting.point, router, seed if len(rows) > 1 else "", episode, *figures])
    write_text(path, text.getvalue())


def qos_table(out: Path, question: Question) -> str:
    """A table in Markdown: mean QoS and interval of routers by points, ordered by the mean over the points."""
    results = {setting.point: read_evaluation(out, setting) for setting in question.settings}
    points = list(results)
    routers = dict.fromkeys(name for of_point in results.values() for name in of_point)

    def mean(name: str) -> float:
        return float(np.mean([interval(results[point][name]).mean for point in points if name in results[point]]))

    rows = []
    for name in sorted(routers, key=mean, reverse=True):
        cells = [_cell(interval(results[point][name])) if name in results[point] else "" for point in points]
        whole = all(name in results[point] for point in points) and len(points) > 1
        rows.append([label_of(name), *cells, f"{mean(name):.4f}" if whole else ""])
    header = [question.axis, *points, "mean"]
    return markdown(header, rows)


def ablation_table(out: Path, settings: Sequence[Setting]) -> str:
    """A table in Markdown: QoS of each ablation, and its paired difference from the first one."""
    default = read_evaluation(out, settings[0])
    rows = []
    for setting in settings:
        results = read_evaluation(out, setting)
        pair = paired_difference(per_episode(results["trained"]), per_episode(default["trained"]))
        difference = "" if setting is settings[0] else f"{pair.mean:+.4f} ± {pair.half_width:.4f}"
        drops = float(np.mean([row["drop_rate"] for row in results["trained"]]))
        rows.append([setting.point, _cell(interval(results["trained"])), difference, f"{drops:.1%}"])
    return markdown(["ablation", "QoS", "difference, paired over episodes", "dropped"], rows)


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, header))} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def _cell(value: Interval) -> str:
    return f"{value.mean:.4f} ± {value.half_width:.4f}"
