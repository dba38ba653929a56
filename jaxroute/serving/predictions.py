"""What is predicted of a request before it is sent: tokens of its prompt, score and output length at each expert."""

from collections.abc import Sequence

import numpy as np

from jaxroute.errors import UserError
from jaxroute.predictor.features import sentence_encoder
from jaxroute.predictor.store import StoredPredictor
from jaxroute.serving.openai import Completion

FIRST_LENGTH = 200.0
"""Output tokens that are predicted before any request has ended."""

WEIGHT = 1 / 50
"""Weight of the newest request in running means."""


class Predictions:
    """Predictions for N experts: by a predictor on the text, or else by running means that start at given scores."""

    def __init__(self, names: Sequence[str], mean_scores: Sequence[float], stored: StoredPredictor | None):
        """Raises `UserError` if the predictor does not know one of the experts."""
        self._scores = np.asarray(mean_scores, np.float32)
        self._lengths = np.full(len(names), FIRST_LENGTH)
        self._stored, self._columns, self._encoder = stored, [], None
        self._prompt_ratio = 1.0  # true tokens of a prompt per estimated token
        if stored is not None:
            missing = [name for name in names if name not in stored.experts]
            if missing:
                raise UserError(
                    f"the predictor does not know expert {', '.join(missing)}; it was trained on "
                    f"{', '.join(stored.experts)}; name the cluster's experts so, or train anew"
                )
            self._columns = [stored.experts.index(name) for name in names]
            self._encoder = sentence_encoder(stored.encoder) if stored.encoder else None

    def __call__(self, asked: Completion) -> tuple[np.ndarray, np.ndarray]:
        """(score float32 [N], output tokens int32 [N], at least 1) of a request."""
        if self._stored is None:
            scores, lengths = self._scores, self._lengths
        else:
            prediction = self._stored.predictor([asked.text], self._encoder)
            scores = prediction.score[0, self._columns].astype(np.float32)
            lengths = prediction.output_tokens[0, self._columns]
        return scores, np.clip(np.rint(lengths), 1, asked.most_tokens or None).astype(np.int32)

    def prompt_tokens(self, asked: Completion) -> int:
        """Tokens of the prompt: counted if it is given as tokens, else estimated from its text."""
        if asked.prompt_tokens is not None:
            return max(asked.prompt_tokens, 1)
        return max(round(self._prompt_ratio * asked.estimated_prompt_tokens), 1)

    def learn(self, expert: int, asked: Completion, prompt_tokens: int | None, output_tokens: int) -> None:
        """Takes a completed request into the running means."""
        self._lengths[expert] += WEIGHT * (output_tokens - self._lengths[expert])
        if prompt_tokens is not None and asked.prompt_tokens is None:
            estimated = max(asked.estimated_prompt_tokens, 1.0)
            self._prompt_ratio += WEIGHT * (np.clip(prompt_tokens / estimated, 0.1, 10) - self._prompt_ratio)
