"""Requests: the true and predicted lengths and scores for every expert.

Each class has `num_experts`, `draws` (the number of uniforms per request) and `sample(uniforms [draws], row) ->
Request`, which `Workload` calls; `row` is the arrival's row in the trace, which only `TraceRequests` uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxroute.errors import UserError
from jaxroute.workload.frozen import (
    LOG_OUTPUT_MEAN,
    LOG_OUTPUT_PREDICTED,
    LOG_OUTPUT_SHARED_STD,
    LOG_OUTPUT_STD,
    LOG_PROMPT_MEAN,
    LOG_PROMPT_STD,
    MAX_TOKENS,
    MIN_TOKENS,
    SCORE_PREDICTED_SHARE,
    SCORE_PREDICTION_STD,
    SCORE_SHARED_STD,
    SCORE_STD,
)
from jaxroute.workload.request import Request
from jaxroute.workload.table import RequestTable
from jaxroute.workload.trace_lengths import Lengths


def _mixture(num_experts: int) -> np.ndarray:
    """The frozen generator as a matrix from standard normals [3 + 3N] to deviations from the means [1 + 4N].

    Inputs: the prompt, the shared terms of score and length, then for each expert its own term of the score, the noise
    of the score prediction and its own term of the length. Outputs: log prompt tokens, then for each expert log output
    tokens, their prediction, score, its prediction.
    """
    eye = np.eye(num_experts)
    own_score, noise, own_length = (slice(3 + i * num_experts, 3 + (i + 1) * num_experts) for i in range(3))
    output, predicted_output, score, predicted_score = (
        slice(1 + i * num_experts, 1 + (i + 1) * num_experts) for i in range(4)
    )
    matrix = np.zeros((3 + 3 * num_experts, 1 + 4 * num_experts))
    matrix[0, 0] = LOG_PROMPT_STD
    matrix[1, score] = matrix[1, predicted_score] = SCORE_SHARED_STD
    matrix[2, output] = matrix[2, predicted_output] = LOG_OUTPUT_SHARED_STD
    matrix[own_score, score] = SCORE_STD * eye
    matrix[own_score, predicted_score] = SCORE_PREDICTED_SHARE * SCORE_STD * eye
    matrix[noise, predicted_score] = SCORE_PREDICTION_STD * eye
    matrix[own_length, output] = LOG_OUTPUT_STD * eye
    matrix[own_length, predicted_output] = LOG_OUTPUT_PREDICTED * eye
    return matrix


def _deviations(uniforms: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Deviations of the log prompt tokens, [], and of log output, its prediction, score and its prediction, [4, N].

    `uniforms` [3 + 3N] are strictly between 0 and 1. It is a matrix product because XLA would otherwise recompute every
    normal for each quantity that uses it. On a CPU, the product takes less than half the time.
    """
    normals = jax.lax.erf_inv(2 * uniforms - 1)
    matrix = jnp.asarray(np.sqrt(2.0) * _mixture(num_experts), uniforms.dtype)
    deviations = jnp.dot(normals, matrix, precision=jax.lax.Precision.HIGHEST)
    return deviations[0], deviations[1:].reshape(4, num_experts)


def mean_scores(score_mean: Sequence[float] | np.ndarray) -> jax.Array:
    """Each expert's mean score, float [N], as given. Raises `UserError` unless all are from 0 to 1."""
    means = np.asarray(score_mean, np.float64)
    if means.ndim != 1 or not means.size or not ((means >= 0) & (means <= 1)).all():
        raise UserError(f"the experts' mean scores must be one number from 0 to 1 each, are {means.tolist()}")
    return jnp.asarray(means, float)


def drawn_of(count: int, uniform: jax.Array) -> jax.Array:
    """int32 []: one of the numbers from 0 to `count` - 1, which a uniform draws, all equally likely."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)  # the product may round up to `count`


def _tokens(logarithm: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(logarithm), MIN_TOKENS, MAX_TOKENS).astype(jnp.int32)


class WithMeanScores:
    """What the kinds of requests share whose experts have mean scores."""

    score_mean: jax.Array  # float [N]

    @property
    def num_experts(self) -> int:
        """N."""
        return self.score_mean.shape[-1]


class _WithFrozenNormals(WithMeanScores):
    """What the kinds of requests share that are made of the frozen generator's normals."""

    @property
    def draws(self) -> int:
        """A uniform for each normal of the frozen generator, whether all are used or not."""
        return 3 + 3 * self.num_experts


class FrozenRequests(_WithFrozenNormals, struct.PyTreeNode):
    """The frozen generator of `paper-3` and `paper-6`; `frozen.py` has its constants and formulas."""

    score_mean: jax.Array  # float [N], each expert's mean score, 0 to 1, traced

    @classmethod
    def create(cls, score_mean: Sequence[float] | np.ndarray) -> FrozenRequests:
        """From each expert's mean score, [N] from 0 to 1. Raises `UserError`."""
        return cls(score_mean=mean_scores(score_mean))

    def sample(self, uniforms: jax.Array, row: jax.Array) -> Request:
        """A request of the generator, from `uniforms` [draws]."""
        del row
        prompt, (output, predicted_output, score, predicted_score) = _deviations(uniforms, self.num_experts)
        return Request(
            prompt_tokens=_tokens(LOG_PROMPT_MEAN + prompt),
            output_tokens=_tokens(LOG_OUTPUT_MEAN + output),
            score=jnp.clip(self.score_mean + score, 0.0, 1.0),
            predicted_output_tokens=_tokens(LOG_OUTPUT_MEAN + predicted_output),
            predicted_score=self.score_mean + predicted_score,
        )


class QuantileRequests(_WithFrozenNormals, struct.PyTreeNode):
    """Requests with lengths drawn from Q quantiles at equal steps of the level; the rest is as in the frozen generator.

    A normal of the frozen generator gives the level of the prompt, and one for each expert that of its output: so
    outputs of one request at different experts are alike (the normals have a correlation of .5), and independent of the
    prompt. Between two quantiles the logarithm of the length is linear in the level; lengths are rounded. The predicted
    length has the frozen generator's error, as in `TraceRequests`, within the smallest and the largest length.
    """

    log_prompt: jax.Array  # float [Q], logarithms of the quantiles in tokens, traced
    log_output: jax.Array  # float [Q], traced
    score_mean: jax.Array  # float [N], each expert's mean score, 0 to 1, traced

    @classmethod
    def create(cls, lengths: Lengths, score_mean: Sequence[float] | np.ndarray) -> QuantileRequests:
        """From quantiles and each expert's mean score, [N] from 0 to 1. Raises `UserError`."""
        return cls(
            log_prompt=jnp.asarray(np.log(lengths.prompt_tokens), float),
            log_output=jnp.asarray(np.log(lengths.output_tokens), float),
            score_mean=mean_scores(score_mean),
        )

    def sample(self, uniforms: jax.Array, row: jax.Array) -> Request:
        """A request from `uniforms` [draws]."""
        del row
        prompt, (output, predicted_output, score, predicted_score) = _deviations(uniforms, self.num_experts)
        log_prompt = _at_normal(self.log_prompt, prompt / LOG_PROMPT_STD)
        log_output = _at_normal(self.log_output, output / math.hypot(LOG_OUTPUT_SHARED_STD, LOG_OUTPUT_STD))
        log_predicted = jnp.clip(log_output + predicted_output - output, self.log_output[0], self.log_output[-1])
        return Request(
            prompt_tokens=_rounded(log_prompt),
            output_tokens=_rounded(log_output),
            score=jnp.clip(self.score_mean + score, 0.0, 1.0),
            predicted_output_tokens=_rounded(log_predicted),
            predicted_score=self.score_mean + predicted_score,
        )


def _at_normal(quantiles: jax.Array, normal: jax.Array) -> jax.Array:
    """What has the same level among `quantiles` [Q] as standard `normal` variates [...]."""
    steps = quantiles.shape[0] - 1
    place = steps * jax.scipy.special.ndtr(normal)
    below = jnp.minimum(place.astype(jnp.int32), steps - 1)
    return quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])


def _rounded(log_tokens: jax.Array) -> jax.Array:
    return jnp.round(jnp.exp(log_tokens)).astype(jnp.int32)


class TableRequests(struct.PyTreeNode):
    """Requests from a table of T rows on the device; every request is a row drawn uniformly with replacement."""

    rows: Request  # traced, every field with a leading axis [T]

    @classmethod
    def create(cls, table: RequestTable) -> TableRequests:
        """Moves a table to the device."""
        return cls(
            rows=Request(
                prompt_tokens=jnp.asarray(table.prompt_tokens, jnp.int32),
                output_tokens=jnp.asarray(table.output_tokens, jnp.int32),
                score=jnp.asarray(table.score, float),
                predicted_output_tokens=jnp.asarray(table.predicted_output_tokens, jnp.int32),
                predicted_score=jnp.asarray(table.predicted_score, float),
            )
        )

    @property
    def num_experts(self) -> int:
        """N."""
        return self.rows.score.shape[-1]

    @property
    def draws(self) -> int:
        """One uniform: which row."""
        return 1

    def sample(self, uniforms: jax.Array, row: jax.Array) -> Request:
        """The row of the table that `uniforms` [1] draw."""
        del row
        count = self.rows.prompt_tokens.shape[0]
        drawn = drawn_of(count, uniforms[0])
        return jax.tree.map(lambda column: column[drawn], self.rows)


class TraceRequests(_WithFrozenNormals, struct.PyTreeNode):
    """Requests with the lengths of the arriving row of the trace; scores and predictions as in the frozen generator.

    A trace records one output length, which is the true length at every expert. The predicted length has the frozen
    generator's error: it is exp((.35 - .5) z) times the true length, rounded down, at least 1. Lengths are not limited.
    """

    prompt_tokens: jax.Array  # int32 [T], traced
    output_tokens: jax.Array  # int32 [T], traced
    score_mean: jax.Array  # float [N], each expert's mean score, 0 to 1, traced

    @classmethod
    def create(
        cls, prompt_tokens: np.ndarray, output_tokens: np.ndarray, score_mean: Sequence[float] | np.ndarray
    ) -> TraceRequests:
        """From the trace's lengths, int [T], and each expert's mean score, [N] from 0 to 1. Raises `UserError`."""
        return cls(
            prompt_tokens=jnp.asarray(prompt_tokens, jnp.int32),
            output_tokens=jnp.asarray(output_tokens, jnp.int32),
            score_mean=mean_scores(score_mean),
        )

    def sample(self, uniforms: jax.Array, row: jax.Array) -> Request:
        """The lengths of `row` (int32 []), with scores and predictions from `uniforms` [draws]."""
        _, (output, predicted_output, score, predicted_score) = _deviations(uniforms, self.num_experts)
        recorded = self.output_tokens[row]
        predicted = (recorded * jnp.exp(predicted_output - output)).astype(jnp.int32)
        return Request(
            prompt_tokens=self.prompt_tokens[row],
            output_tokens=jnp.broadcast_to(recorded, (self.num_experts,)),
            score=jnp.clip(self.score_mean + score, 0.0, 1.0),
            predicted_output_tokens=jnp.maximum(predicted, 1),
            predicted_score=self.score_mean + predicted_score,
        )
