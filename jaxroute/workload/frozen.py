"""The frozen request generator's constants, and its prediction errors applied to recorded data.

The generator belongs to the environments `paper-3` and `paper-6`, and its constants must never change: another
generator gets another name. Per request and expert, with independent standard normals a, b, c (one per request) and
e, n, z (one per expert), calibrated to the mean BERTScores that the paper's experts reach on MixInstruct:

    score            = clip(mean + .06 b + .08 e, 0, 1)
    predicted score  = mean + .06 b + .5 * .08 e + .028 n
    prompt           = exp(3.9 + .7 a)             in 4..256, rounded down
    output           = exp(4.3 + .5 c + .5 z)      in 4..256, rounded down
    predicted output = exp(4.3 + .5 c + .35 z)     in 4..256, rounded down
"""

from __future__ import annotations

import math

import numpy as np

SCORE_SHARED_STD = 0.06  # of the term that all experts share: how hard the prompt is
SCORE_STD = 0.08  # of each expert's own term
SCORE_PREDICTED_SHARE = 0.5  # of the own term that a predictor sees
SCORE_PREDICTION_STD = 0.028  # of the predictor's own noise

LOG_PROMPT_MEAN = 3.9  # log tokens
LOG_PROMPT_STD = 0.7
LOG_OUTPUT_MEAN = 4.3
LOG_OUTPUT_SHARED_STD = 0.5  # of the term that all experts share: how long an answer the prompt asks for
LOG_OUTPUT_STD = 0.5  # factor of each expert's own z
LOG_OUTPUT_PREDICTED = 0.35  # factor of the same z in the prediction
MIN_TOKENS = 4  # bounds of prompts and outputs; MixInstruct has at most 256 of either
MAX_TOKENS = 256

# What is left between truth and prediction, as one normal each.
SCORE_ERROR_STD = math.hypot((1 - SCORE_PREDICTED_SHARE) * SCORE_STD, SCORE_PREDICTION_STD)  # .0488
LOG_OUTPUT_ERROR_STD = LOG_OUTPUT_STD - LOG_OUTPUT_PREDICTED  # .15


def predict_with_frozen_errors(
    rng: np.random.Generator, output_tokens: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (output tokens int32, score float64) for recorded truths of any one shape that come without any.

    The truth with errors of the frozen generator's size. There the log lengths differ by (.35 - .5) z, hence

        predicted output = output * exp(.15 z'),  z' ~ N(0, 1), rounded down, at least 1;

    and the scores by -.5 e + N(0, .028) with e ~ N(0, .08), two normals that add up to one, hence

        predicted score = score + N(0, .04^2 + .028^2), a standard deviation of .0488.

    The errors are independent of the truth, while the generator's own shrink towards the mean.
    """
    factor = np.exp(LOG_OUTPUT_ERROR_STD * rng.standard_normal(output_tokens.shape))
    predicted_tokens = np.clip(np.floor(output_tokens * factor), 1, np.iinfo(np.int32).max).astype(np.int32)
    return predicted_tokens, score + SCORE_ERROR_STD * rng.standard_normal(score.shape)
