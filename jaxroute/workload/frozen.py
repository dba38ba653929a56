"""The constants of the frozen request generator, and its prediction errors for recorded data.

The environments `paper-3` and `paper-6` use the generator. Its constants must never change: another generator gets
another name. It is calibrated to the mean BERTScores of the paper's experts on MixInstruct. With independent standard
normals a, b, c (per request) and e, n, z (per request and expert):

    score            = clip(mean + .06 b + .08 e, 0, 1)
    predicted score  = mean + .06 b + .5 * .08 e + .028 n
    prompt           = exp(3.9 + .7 a)             in 4..256, rounded down
    output           = exp(4.3 + .5 c + .5 z)      in 4..256, rounded down
    predicted output = exp(4.3 + .5 c + .35 z)     in 4..256, rounded down
"""

import math

import numpy as np

SCORE_SHARED_STD = 0.06  # of the term that all experts share: the difficulty of the prompt
SCORE_STD = 0.08  # of each expert's own term
SCORE_PREDICTED_SHARE = 0.5  # share of the expert's own term that a predictor sees
SCORE_PREDICTION_STD = 0.028  # of the noise of the predictor

LOG_PROMPT_MEAN = 3.9  # log tokens
LOG_PROMPT_STD = 0.7
LOG_OUTPUT_MEAN = 4.3
LOG_OUTPUT_SHARED_STD = 0.5  # of the term that all experts share: the answer length that the prompt asks for
LOG_OUTPUT_STD = 0.5  # factor of each expert's own z
LOG_OUTPUT_PREDICTED = 0.35  # factor of the same z in the prediction
MIN_TOKENS = 4  # bounds of prompts and outputs; MixInstruct has at most 256 tokens of each
MAX_TOKENS = 256

# The difference between true and predicted value as a single normal.
SCORE_ERROR_STD = math.hypot((1 - SCORE_PREDICTED_SHARE) * SCORE_STD, SCORE_PREDICTION_STD)  # .0488
LOG_OUTPUT_ERROR_STD = LOG_OUTPUT_STD - LOG_OUTPUT_PREDICTED  # .15


def predict_with_frozen_errors(
    rng: np.random.Generator, output_tokens: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (output tokens int32, score float64) for recorded values without predictions, of any one shape.

    They are the true values with errors of the frozen generator's size. Its log lengths differ by (.35 - .5) z, hence

        predicted output = output * exp(.15 z'),  z' ~ N(0, 1), rounded down, at least 1.

    Its scores differ by -.5 e + N(0, .028) with e ~ N(0, .08), a sum of two normals, hence

        predicted score = score + N(0, .04^2 + .028^2), a standard deviation of .0488.

    These errors are independent of the true values, while the predictions of the generator shrink towards the mean.
    """
    factor = np.exp(LOG_OUTPUT_ERROR_STD * rng.standard_normal(output_tokens.shape))
    predicted_tokens = np.clip(np.floor(output_tokens * factor), 1, np.iinfo(np.int32).max).astype(np.int32)
    return predicted_tokens, score + SCORE_ERROR_STD * rng.standard_normal(score.shape)
