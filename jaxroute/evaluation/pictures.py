"""The two pictures of a run: learning curves, and the QoS of the routers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from jaxroute.drawing import INK, OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.evaluation.episodes import EpisodeValues
from jaxroute.evaluation.statistics import Interval, mean_interval, paired_difference
from jaxroute.routers import ROUTER_LABELS

CURVES = (
    ("qos", "QoS", "QoS per request"),
    ("reward", "Reward", "reward per decision"),
    ("entropy", "Entropy of the policy", "nats"),
    ("critic_loss", "Critic loss", "squared error"),
)


def learning_curve(path: Path, records: Sequence[dict[str, Any]], results: dict[str, EpisodeValues]) -> None:
    """Writes a PNG of the training `records` (rows of metrics.jsonl), and the best heuristic of `results` as a line."""
    frames = np.array([record["frames"] for record in records])
    heuristics = {name: float(values["qos"].mean()) for name, values in results.items() if name != "trained"}
    with picture(path, 10, 6.4) as figure:
        for axes, (key, title, unit) in zip(figure.subplots(2, 2, sharex=True).flat, CURVES, strict=True):
            values = np.array([np.nan if record[key] is None else record[key] for record in records])
            axes.plot(frames, values, color=TRAINED_COLOUR, linewidth=1.6, marker="o" if len(frames) < 20 else None)
            axes.set(title=title, ylabel=unit, xlim=(0, 1.02 * frames[-1]))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.tick_params(labelbottom=True)
            if key == "qos" and heuristics:
                best = max(heuristics, key=lambda name: heuristics[name])
                label = f"{ROUTER_LABELS[best]}: {heuristics[best]:.3f}"
                axes.axhline(heuristics[best], color=INK, linewidth=1.2, linestyle="--", label=label)
                axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), fontsize=9)
            if np.isnan(values).all():
                axes.text(0.5, 0.5, "no update yet", transform=axes.transAxes, ha="center", va="center")
                axes.set_yticks([])
            elif key == "critic_loss" and np.nanmax(values) > 10 * np.nanmin(values) > 0:
                axes.set_yscale("log")
        for axes in figure.axes[2:]:
            axes.set_xlabel("training frames (decisions)")


def qos_comparison(path: Path, results: dict[str, EpisodeValues]) -> None:
    """Writes a PNG of each router's mean QoS and the trained router's paired lead, with 95 % intervals."""
    names = sorted(results, key=lambda name: float(results[name]["qos"].mean()))
    others = [name for name in names if name != "trained"]
    episodes = len(results[names[0]]["qos"])
    compares = "trained" in results and bool(others)
    with picture(path, 11 if compares else 6.5, 1.6 + 0.5 * len(names)) as figure:
        panels = figure.subplots(1, 2 if compares else 1, squeeze=False, sharey=True)[0]
        intervals = [mean_interval(results[name]["qos"]) for name in names]
        colours = [TRAINED_COLOUR if name == "trained" else OTHER_COLOUR for name in names]
        panels[0].barh([ROUTER_LABELS[name] for name in names], [i.mean for i in intervals], color=colours, height=0.62)
        _intervals(panels[0], dict(enumerate(intervals)), INK, "", "{:.3f} ± {:.3f}")
        panels[0].set(title=f"QoS over {episodes} episodes", xlabel="mean QoS per request, 95 % interval")
        panels[0].set_xlim(0, 1.4 * max(max(interval.high for interval in intervals), 1e-3))
        if compares:
            trained = results["trained"]["qos"]
            leads = {names.index(name): paired_difference(trained, results[name]["qos"]) for name in others}
            panels[1].axvline(0, color=INK, linewidth=1)
            _intervals(panels[1], leads, TRAINED_COLOUR, "o", "{:+.3f} ± {:.3f}")
            panels[1].set(
                title="Lead of the trained router", xlabel="QoS of trained less the router's, paired 95 % interval"
            )
            panels[1].margins(x=0.3)
        for axes in panels:
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)


def _intervals(axes: Axes, intervals: dict[int, Interval], colour: str, marker: str, form: str) -> None:
    for row, interval in intervals.items():
        mean, half_width = interval
        axes.errorbar(mean, row, xerr=half_width, color=colour, marker=marker, markersize=6, capsize=4, linewidth=1.6)
        text = form.format(mean, half_width)
        axes.annotate(text, (interval.high, row), (8, 0), textcoords="offset points", va="center")
