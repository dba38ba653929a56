"""Requests whose lengths, scores and predictions have traced distributions, so that one program serves any of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.workload.request import Request
from jaxroute.workload.requests import WithMeanScores


class LognormalRequests(WithMeanScores, struct.PyTreeNode):
    """Log-normal lengths, normal scores, and predictors from blind to exact.

    A predictor with coefficient of determination k knows a deviation d from the mean, of standard deviation s, as
    `k d + sqrt(k (1 - k)) s n` with a standard normal n: 0 is the mean for every request, 1 is the truth, and between
    them the mean of d given the prediction is the prediction. Lengths are predicted in their logarithm.
    """

    log_prompt_mean: jax.Array  # float [], log tokens, as all logarithms here; all fields are traced
    log_prompt_std: jax.Array  # float []
    log_output_mean: jax.Array  # float [N]
    log_output_std: jax.Array  # float []
    output_shared: jax.Array  # float [], 0 to 1: correlation of one request's log output lengths at two experts
    length_known: jax.Array  # float [], 0 to 1: coefficient of determination of the predicted log length
    score_mean: jax.Array  # float [N], 0 to 1
    score_shared_std: jax.Array  # float [], of the term that all experts share
    score_std: jax.Array  # float [], of each expert's own term
    score_known: jax.Array  # float [], 0 to 1: coefficient of determination of both terms' predictions
    most_prompt_tokens: jax.Array  # int32 []: longer prompts are cut
    most_output_tokens: jax.Array  # int32 []: longer outputs, and predictions, are cut

    @property
    def draws(self) -> int:
        """Two uniforms for the prompt and the shared length, two for the shared score, four for each expert."""
        return 4 + 4 * self.num_experts

    def sample(self, uniforms: jax.Array, row: jax.Array) -> Request:
        """A request from `uniforms` [draws], strictly between 0 and 1."""
        del row
        normals = jnp.sqrt(2.0) * jax.lax.erf_inv(2 * uniforms - 1)
        prompt, length, difficulty, difficulty_noise = normals[:4]
        own_length, length_noise, own_score, score_noise = normals[4:].reshape(4, self.num_experts)

        shared = self.output_shared
        deviation = self.log_output_std * (jnp.sqrt(shared) * length + jnp.sqrt(1 - shared) * own_length)
        own, common = self.score_std * own_score, self.score_shared_std * difficulty
        predicted = _predicted(self.length_known, deviation, self.log_output_std * length_noise)
        predicted_score = _predicted(self.score_known, own, self.score_std * score_noise) + _predicted(
            self.score_known, common, self.score_shared_std * difficulty_noise
        )
        return Request(
            prompt_tokens=_tokens(self.log_prompt_mean + self.log_prompt_std * prompt, self.most_prompt_tokens),
            output_tokens=_tokens(self.log_output_mean + deviation, self.most_output_tokens),
            score=jnp.clip(self.score_mean + own + common, 0.0, 1.0),
            predicted_output_tokens=_tokens(self.log_output_mean + predicted, self.most_output_tokens),
            predicted_score=self.score_mean + predicted_score,
        )


def _predicted(known: jax.Array, deviation: jax.Array, noise: jax.Array) -> jax.Array:
    return known * deviation + jnp.sqrt(known * (1 - known)) * noise


def _tokens(logarithm: jax.Array, most: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(jnp.exp(logarithm)), 1, most).astype(jnp.int32)
