"""The held-out metrics of a predictor as a table, and its predictions as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from rich import box
from rich.table import Table

from jaxroute.drawing import INK, OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.predictor.model import Prediction

ROWS = (  # label; target and metric of `predictor.metrics.held_out_metrics`; factor; decimals
    ("score: MAE", "score", "mae", 1, 4),
    ("  of the mean", "score", "mae_of_mean", 1, 4),
    ("  of the median", "score", "mae_of_median", 1, 4),
    ("  rank correlation", "score", "rank_correlation", 1, 3),
    ("  bucket hit, %", "score", "bucket_accuracy", 100, 1),
    ("    of a constant", "score", "bucket_accuracy_of_constant", 100, 1),
    ("log output tokens: MAE", "log_tokens", "mae", 1, 4),
    ("  of the mean", "log_tokens", "mae_of_mean", 1, 4),
    ("  of the median", "log_tokens", "mae_of_median", 1, 4),
    ("  rank correlation", "log_tokens", "rank_correlation", 1, 3),
    ("  bucket hit, %", "log_tokens", "bucket_accuracy", 100, 1),
    ("    of a constant", "log_tokens", "bucket_accuracy_of_constant", 100, 1),
    ("output tokens: MAE", "tokens", "mae", 1, 1),
    ("  of the mean", "tokens", "mae_of_mean", 1, 1),
    ("  of the median", "tokens", "mae_of_median", 1, 1),
)
BINS = 5  # points of the calibration line in the picture


def metrics_table(metrics: dict[str, Any], experts: Sequence[str], prompts: int) -> Table:
    """A table with the experts in columns, and all of them together in the last column."""
    title = f"{prompts} held-out prompts"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for expert in experts:
        table.add_column(expert, justify="right")
    table.add_column("all", justify="right", style="bold")
    for label, target, metric, factor, decimals in ROWS:
        if not label.startswith(" ") and table.row_count:
            table.add_section()
        values = metrics[target][metric]
        table.add_row(label, *("-" if value is None else f"{factor * value:.{decimals}f}" for value in values))
    return table


def best_expert_line(metrics: dict[str, Any], experts: Sequence[str], best_on_average: int) -> str:
    """One line on the share of prompts whose best expert is predicted, and on the resulting mean score."""
    best = metrics["best_expert"]
    return (
        f"best expert named for {100 * best['share_named']:.1f} % of prompts (always {experts[best_on_average]}: "
        f"{100 * best['share_of_best_on_average']:.1f} %), mean score {best['score_of_named']:.4f} (always "
        f"{best['score_of_best_on_average']:.4f}, the best for each prompt {best['score_of_best']:.4f})"
    )


def predictions_picture(
    path: Path, experts: Sequence[str], prediction: Prediction, score: np.ndarray, output_tokens: np.ndarray
) -> None:
    """Writes a PNG of true against predicted values for each expert: scores above, output tokens below."""
    targets = ("score", prediction.score, score), ("output tokens", prediction.output_tokens, output_tokens)
    with picture(path, max(3.4 * len(experts), 6.8), 6.8) as figure:
        rows = figure.subplots(2, len(experts), squeeze=False, sharex="row", sharey="row")
        for panels, (what, predicted, truth) in zip(rows, targets, strict=True):
            for index, (axes, expert) in enumerate(zip(panels, experts, strict=True)):
                if what == "output tokens":
                    axes.set(xscale="log", yscale="log")
                    for axis in (axes.xaxis, axes.yaxis):
                        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                        axis.set_major_formatter(ScalarFormatter())
                        axis.set_minor_locator(NullLocator())
                else:
                    axes.locator_params(nbins=5)
                _scatter(axes, predicted[:, index], truth[:, index])
                axes.set(title=expert, xlabel=f"predicted {what}", ylabel=f"true {what}" if index == 0 else "")
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _scatter(axes: Axes, predicted: np.ndarray, truth: np.ndarray) -> None:
    """Draws prompts as points, the median true value of equal shares of them as a line, and the diagonal."""
    axes.scatter(
        predicted, truth, s=14, color=OTHER_COLOUR, alpha=0.6, linewidths=0, label=f"{len(truth)} held-out prompts"
    )
    parts = [part for part in np.array_split(np.argsort(predicted, kind="stable"), BINS) if len(part)]
    centres = [np.median(predicted[part]) for part in parts]
    medians = [np.median(truth[part]) for part in parts]
    axes.plot(centres, medians, color=TRAINED_COLOUR, marker="o", linewidth=1.6, label=f"median, {BINS} equal shares")
    ends = [predicted.min(), predicted.max()]
    axes.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="true = predicted")
