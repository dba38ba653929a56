"""The errors of a predictor on held-out prompts, as numbers and as a table, and its predictions as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from rich import box
from rich.table import Table
from scipy.stats import spearmanr

from jaxroute.drawing import INK, OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.predictor.model import Buckets, Prediction, Predictor


def held_out_metrics(
    predictor: Predictor,
    prediction: Prediction,
    truth: tuple[np.ndarray, np.ndarray],
    training: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Metrics of a `prediction` for P held-out prompts; `truth` is their score and output tokens, each [P, N].

    `training` are the same values of the training prompts, from which the constants are computed. Except under
    "best_expert", every entry is a list of N + 1 numbers: for each expert, and for all together (None if undefined).

    "score", "log_tokens" and "tokens" have "mae"; "mae_of_mean" and "mae_of_median" of the constants; and the rank
    correlation (Spearman) over prompts, whose overall value is the mean over experts. The first two also have
    "mae_of_expectation", with the mean of the distribution instead of its median; "bucket_accuracy"; and
    "bucket_accuracy_of_constant", with the most frequent bucket. "best_expert" has the share of prompts for which the
    expert with the highest prediction has the highest score, and that share for the expert with the highest mean; and
    the mean scores of the predicted expert, of the expert with the highest mean, and of the best for each prompt.
    """
    targets = {
        "score": (prediction.score, truth[0], training[0]),
        "log_tokens": (prediction.log_tokens, np.log(truth[1]), np.log(training[1])),
        "tokens": (prediction.output_tokens, truth[1], training[1]),
    }
    metrics: dict[str, Any] = {name: _value_metrics(*values) for name, values in targets.items()}
    buckets = {
        "score": (predictor.score, prediction.score_probability),
        "log_tokens": (predictor.log_tokens, prediction.log_tokens_probability),
    }
    for name, (bounds, probability) in buckets.items():
        _, values, known = targets[name]
        metrics[name] |= _bucket_metrics(bounds, probability, values, known)
    score, rows = truth[0], np.arange(len(truth[0]))
    best, of_named = score.max(axis=1), score[rows, prediction.score.argmax(axis=1)]
    of_best_on_average = score[:, training[0].mean(axis=0).argmax()]
    metrics["best_expert"] = {
        "share_named": float((of_named == best).mean()),
        "share_of_best_on_average": float((of_best_on_average == best).mean()),
        "score_of_named": float(of_named.mean()),
        "score_of_best_on_average": float(of_best_on_average.mean()),
        "score_of_best": float(best.mean()),
    }
    return metrics


def _value_metrics(predicted: np.ndarray, truth: np.ndarray, known: np.ndarray) -> dict[str, list[float | None]]:
    rank = [_spearman(p, t) for p, t in zip(predicted.T, truth.T, strict=True)]
    defined = [value for value in rank if value is not None]
    return {
        "mae": _overall(np.abs(predicted - truth)),
        "mae_of_mean": _overall(np.abs(known.mean(axis=0) - truth)),
        "mae_of_median": _overall(np.abs(np.median(known, axis=0) - truth)),
        "rank_correlation": [*rank, sum(defined) / len(defined) if defined else None],
    }


def _bucket_metrics(
    buckets: Buckets, probability: np.ndarray, truth: np.ndarray, known: np.ndarray
) -> dict[str, list[float | None]]:
    labels, size = buckets.labels(truth), probability.shape[-1]
    most = np.array([np.bincount(column, minlength=size).argmax() for column in buckets.labels(known).T])
    return {
        "mae_of_expectation": _overall(np.abs(buckets.expectation(probability) - truth)),
        "bucket_accuracy": _overall(probability.argmax(axis=-1) == labels),
        "bucket_accuracy_of_constant": _overall(most == labels),
    }


def _overall(values: np.ndarray) -> list[float | None]:
    """Means of values [P, N] for each expert and over all."""
    return [*values.mean(axis=0).tolist(), float(values.mean())]


def _spearman(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """Spearman's rank correlation, or None if one of the two is constant."""
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return None
    correlation: Any = spearmanr(predicted, truth)[0]
    return float(correlation)


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
