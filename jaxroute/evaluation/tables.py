"""The evaluation as a table for people and as a JSON file for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxroute.evaluation.episodes import EpisodeValues
from jaxroute.evaluation.statistics import mean_interval, paired_difference
from jaxroute.files import write_text
from jaxroute.routers import ROUTER_LABELS

ROWS = (  # label; metric of `environment.metrics.summarize`; factor; decimals
    ("score of completed", "score", 1, 4),
    ("latency per token, ms", "latency_per_token", 1e3, 1),
    ("  p95", "latency_per_token_p95", 1e3, 1),
    ("TTFT, ms", "ttft", 1e3, 1),
    ("  p95", "ttft_p95", 1e3, 1),
    ("TPOT, ms", "tpot", 1e3, 1),
    ("  p95", "tpot_p95", 1e3, 1),
    ("over L, % of completed", "violation_rate", 1e2, 1),
    ("dropped, %", "drop_rate", 1e2, 1),
    ("rejected, %", "rejection_rate", 1e2, 2),
    ("  for full slots, %", "full_rejection_rate", 1e2, 2),
    ("preemptions an episode", "preemptions", 1, 1),
    ("KV cache in use, %", "kv_use", 1e2, 1),
    ("engines busy, %", "utilization", 1e2, 1),
    ("QoS per engine-busy s", "qos_per_busy_second", 1, 4),
)


def print_evaluation(console: Console, results: dict[str, EpisodeValues]) -> None:
    """Prints the table, in parts of at most five routers, each with the trained one."""
    first = [name for name in results if name == "trained"]
    others = [name for name in results if name not in first]
    width = 5 - len(first)
    for start in range(0, max(len(others), 1), width):
        console.print(evaluation_table({name: results[name] for name in first + others[start : start + width]}))


def evaluation_table(results: dict[str, EpisodeValues]) -> Table:
    """Routers in columns, metrics in rows, within 80 characters; ± is half of a 95 % interval over the episodes."""
    episodes = len(next(iter(results.values()))["qos"])
    title = f"{episodes} fresh episodes, the same requests for every router"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("mean over episodes", no_wrap=True)
    for name in results:
        table.add_column(ROUTER_LABELS[name], justify="right", style="bold" if name == "trained" else None)
    intervals = [mean_interval(values["qos"]) for values in results.values()]
    table.add_row("QoS per request", *(f"{interval.mean:.4f}" for interval in intervals))
    table.add_row("  ± (95 %)", *(f"{interval.half_width:.4f}" for interval in intervals))
    if "trained" in results and len(results) > 1:
        trained = results["trained"]["qos"]
        leads = {name: paired_difference(trained, values["qos"]) for name, values in results.items()}
        del leads["trained"]
        table.add_row("lead of trained", *(f"{leads[name].mean:+.4f}" if name in leads else "" for name in results))
        widths = (f"{leads[name].half_width:.4f}" if name in leads else "" for name in results)
        table.add_row("  ± (95 %, paired)", *widths)
    table.add_section()
    for label, metric, factor, decimals in ROWS:
        table.add_row(label, *(_shown(_mean(values[metric]), factor, decimals) for values in results.values()))
    return table


def write_evaluation(path: Path, results: dict[str, EpisodeValues], seed: int, notes: Sequence[str]) -> None:
    """Writes every router's metrics: means over episodes, or null; for QoS also each episode, with intervals.

    `notes` are remarks on the data, one line each.
    """
    routers = {}
    for name, values in results.items():
        routers[name] = {
            "qos_interval_95": mean_interval(values["qos"]).half_width,
            "qos_per_episode": [float(qos) for qos in values["qos"]],
            **{metric: _mean(value) for metric, value in values.items()},
        }
        if "trained" in results and name != "trained":
            lead = paired_difference(results["trained"]["qos"], values["qos"])
            routers[name]["lead_of_trained"] = {"mean": lead.mean, "interval_95": lead.half_width}
    episodes = len(next(iter(results.values()))["qos"])
    evaluation = {"episodes": episodes, "seed": seed, "notes": list(notes), "routers": routers}
    write_text(path, json.dumps(evaluation, indent=2) + "\n")


def _mean(values: np.ndarray) -> float | list[Any] | None:
    """Mean over the episodes that have a value, for each expert if there is such an axis; None if no episode has."""
    if values.ndim > 1:
        return [_mean(column) for column in values.T]
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else None


def _shown(value: float | list[Any] | None, factor: float, decimals: int) -> str:
    return "-" if value is None else f"{np.asarray(value) * factor:.{decimals}f}"
