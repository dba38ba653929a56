"""Metrics of predictions on held-out prompts, compared with constant predictions."""

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from jaxroute.predictor.buckets import Buckets
from jaxroute.predictor.model import Prediction, Predictor


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
    score = truth[0]
    named, always = prediction.score.argmax(axis=1), np.full(len(score), training[0].mean(axis=0).argmax())

    def of(expert: np.ndarray) -> np.ndarray:
        return np.take_along_axis(score, expert[:, None], axis=1)[:, 0]

    best = score.max(axis=1)
    metrics["best_expert"] = {
        "share_named": float((of(named) == best).mean()),
        "share_of_best_on_average": float((of(always) == best).mean()),
        "score_of_named": float(of(named).mean()),
        "score_of_best_on_average": float(of(always).mean()),
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
