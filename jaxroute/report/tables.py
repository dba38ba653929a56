"""The evaluation as a table for people and as a JSON file for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxroute.report.evaluation import EpisodeValues
from jaxroute.report.files import write_text
from jaxroute.report.names import ROUTER_LABELS
from jaxroute.report.statistics import mean_interval, paired_difference

ROWS = (  # label; metrics of `environment.metrics.summarize`, shown in this order; factor; decimals
    ("score of completed requests", ("score",), 1, 3),
    ("latency/token, ms, mean / p95", ("latency_per_token", "latency_per_token_p95"), 1e3, 1),
    ("TTFT, ms, mean / p95", ("ttft", "ttft_p95"), 1e3, 1),
    ("TPOT, ms, mean / p95", ("tpot", "tpot_p95"), 1e3, 1),
    ("over the limit, % of them", ("violation_rate",), 1e2, 1),
    ("dropped, %", ("drop_rate",), 1e2, 1),
    ("rejected in all, %", ("rejection_rate",), 1e2, 2),
    ("rejected for full slots, %", ("full_rejection_rate",), 1e2, 2),
    ("preemptions per episode", ("preemptions",), 1, 1),
    ("KV cache in use, %", ("kv_use",), 1e2, 1),
    ("engines busy, %", ("utilization",), 1e2, 1),
    ("QoS per engine-busy second", ("qos_per_busy_second",), 1, 3),
)


def report_console() -> Console:
    """Standard output, wide enough for the table where it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=132)


def evaluation_table(results: dict[str, EpisodeValues]) -> Table:
    """Routers in columns, metrics in rows; ± is half of a 95 % interval over the episodes."""
    episodes = len(next(iter(results.values()))["qos"])
    table = Table(
        title=f"{episodes} fresh episodes, the same requests for every router",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("mean over episodes")
    for name in results:
        table.add_column(ROUTER_LABELS[name], justify="right", style="bold" if name == "trained" else None)
    table.add_row(
        "QoS per request, ± 95 %", *("{:.4f} ± {:.4f}".format(*mean_interval(v["qos"])) for v in results.values())
    )
    if "trained" in results and len(results) > 1:
        trained = results["trained"]["qos"]
        leads = (
            "" if name == "trained" else "{:+.4f} ± {:.4f}".format(*paired_difference(trained, values["qos"]))
            for name, values in results.items()
        )
        table.add_row("lead of trained, paired ± 95 %", *leads)
    table.add_section()
    for label, metrics, factor, decimals in ROWS:
        cells = (
            " / ".join(_shown(_mean(values[metric]), factor, decimals) for metric in metrics)
            for values in results.values()
        )
        table.add_row(label, *cells)
    return table


def write_evaluation(path: Path, results: dict[str, EpisodeValues], seed: int) -> None:
    """Every router's metrics: means over episodes, null without a value; QoS also per episode, with intervals."""
    routers = {}
    for name, values in results.items():
        routers[name] = {
            "qos_interval_95": _half_width(mean_interval(values["qos"])),
            "qos_per_episode": [float(qos) for qos in values["qos"]],
            **{metric: _mean(value) for metric, value in values.items()},
        }
        if "trained" in results and name != "trained":
            lead = paired_difference(results["trained"]["qos"], values["qos"])
            routers[name]["lead_of_trained"] = {"mean": lead.mean, "interval_95": _half_width(lead)}
    episodes = len(next(iter(results.values()))["qos"])
    write_text(path, json.dumps({"episodes": episodes, "seed": seed, "routers": routers}, indent=2) + "\n")


def _mean(values: np.ndarray) -> float | list | None:
    """Mean over the episodes that have a value, per expert where there is that axis; None without any."""
    if values.ndim > 1:
        return [_mean(column) for column in values.T]
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else None


def _half_width(interval: Sequence[float]) -> float:
    return interval[1]


def _shown(value: float | list | None, factor: float, decimals: int) -> str:
    return "-" if value is None else f"{np.asarray(value) * factor:.{decimals}f}"
