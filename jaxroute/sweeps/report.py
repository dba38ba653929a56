"""The report of a sweep: best trials, the effect of each key, learning curves, and the best configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from jaxroute.config.loader import config_text
from jaxroute.drawing import OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.files import write_text
from jaxroute.sweeps.display import BEST, short_text
from jaxroute.sweeps.results import Ranked, SeedNoise, SweepFolder, ranking, seed_noise
from jaxroute.sweeps.spec import Spec

CURVES = 5  # number of learning curves
COLOURS = (TRAINED_COLOUR, "#d1495b", "#edae49", "#66a182", "#6a4c93")


def write_report(spec: Spec, folder: SweepFolder) -> None:
    """Writes report.md, best.yaml, effects.png and learning_curves.png; at least one trial must be ranked."""
    rows = folder.rows()
    ranked = ranking(rows)
    write_text(folder.path / "best.yaml", config_text(spec.trials[ranked[0].trial].config))
    effects_picture(folder.path / "effects.png", spec, rows)
    curves_picture(folder.path / "learning_curves.png", spec, ranked[:CURVES], folder.curves())
    write_text(folder.path / "report.md", _report(spec, folder.path, rows, ranked))


def _report(spec: Spec, path: Path, rows: list[dict[str, Any]], ranked: list[Ranked]) -> str:
    diverged = sorted({row["trial"] for row in rows if row["diverged"]})
    seeds, episodes = ", ".join(map(str, spec.seeds)), spec.trials[0].config.evaluation.episodes
    lines = [
        f"# Sweep {path.name}",
        "",
        f"{len(spec.trials)} trials, seeds {seeds}, {spec.rungs[-1]:,} frames. QoS per request on {episodes} fresh "
        "episodes, the same for all; ± is half of a 95 % interval over seeds, with a variance pooled over trials.",
        "",
        "| trial | QoS | frames | " + " | ".join(spec.keys) + " |",
        "|---" * (3 + len(spec.keys)) + "|",
    ]
    for place in ranked[:BEST]:
        values = " | ".join(map(str, spec.trials[place.trial].values.values()))
        lines.append(f"| {place.trial} | {place.text} | {place.frames:,} | {values} |")
    if diverged:
        lines += ["", f"Diverged, and not ranked: trials {', '.join(map(str, diverged))}."]
    lines += [
        "",
        "![Effects](effects.png)",
        "",
        "![Learning curves of the best trials](learning_curves.png)",
        "",
        f"Train with the best: `jaxroute train --config {path / 'best.yaml'}`",
        "",
    ]
    return "\n".join(lines)


def effects_picture(path: Path, spec: Spec, rows: list[dict[str, Any]]) -> None:
    """Writes a PNG with a panel per key: the QoS of trials, and its mean and interval over the trials of each value.

    Trials are compared after the first rung, which all of them reached.
    """
    rows = [row for row in rows if row["rung"] == 0 and not row["diverged"]]
    noise = seed_noise(rows)
    columns = min(3, len(spec.keys))
    lines = -(-len(spec.keys) // columns)
    with picture(path, 4.2 * columns, 3.4 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in panels.flat[len(spec.keys) :]:
            axes.set_visible(False)
        for axes, key in zip(panels.flat, spec.keys, strict=False):
            _effect(axes, key, rows, noise)
        for axes in panels[:, 0]:
            axes.set_ylabel("QoS per request")
        figure.suptitle(
            f"Effect of each key after {spec.rungs[0]:,} frames: trials (dots), mean and 95 % over seeds", fontsize=10
        )


def _effect(axes: Axes, key: str, rows: list[dict[str, Any]], noise: SeedNoise) -> None:
    values = [row[key] for row in rows]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = sorted(set(values)) if numbers else sorted({str(value) for value in values})
    places = {name: name if numbers else index for index, name in enumerate(names)}
    at = np.array([places[value if numbers else str(value)] for value in values], float)
    qos = np.array([row["qos"] for row in rows])
    axes.plot(at, qos, "o", color=OTHER_COLOUR, markersize=4, alpha=0.6, markeredgewidth=0)
    # One mean per value if values repeat, as in a grid; otherwise over five parts of the range.
    edges = np.unique(at) if len(names) <= 16 else np.quantile(at, np.linspace(0, 1, 6))[:-1]
    part = np.searchsorted(edges, at, side="right") - 1
    middle, mean = ([values[part == index].mean() for index in range(len(edges))] for values in (at, qos))
    widths = np.nan_to_num([noise.half_width(int((part == index).sum())) for index in range(len(edges))])
    axes.errorbar(middle, mean, widths, color=TRAINED_COLOUR, marker="o", capsize=3, linewidth=1.6)
    if not numbers:
        axes.set_xticks(range(len(names)), names)
    elif at.min() > 0 and at.max() / at.min() > 20:
        axes.set_xscale("log")
    axes.set_title(key, fontsize=10)


def curves_picture(
    path: Path, spec: Spec, best: Sequence[Ranked], curves: dict[tuple[int, int], list[tuple[int, float]]]
) -> None:
    """Writes a PNG of the training QoS of the best trials: mean and range over seeds."""
    with picture(path, 8, 4.6) as figure:
        axes = figure.subplots()
        for colour, place in zip(COLOURS, best, strict=False):
            points = np.array([curves[place.trial, seed] for seed in spec.seeds])  # [seeds, chunks, 2]
            frames, qos = points[0, :, 0], points[:, :, 1]
            settings = spec.trials[place.trial].values.items()
            values = ", ".join(f"{key.rpartition('.')[2]}={short_text(value)}" for key, value in settings)
            axes.plot(frames, qos.mean(axis=0), color=colour, linewidth=1.6, label=f"{place.trial}: {values}")
            if len(qos) > 1:
                axes.fill_between(frames, qos.min(axis=0), qos.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.set(title="Training of the best trials", xlabel="frames (decisions)", ylabel="QoS per request")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(loc="lower right", fontsize=8)
