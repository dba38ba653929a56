"""Requests as rows in host memory, which the file loaders return."""

from dataclasses import dataclass

import numpy as np

from jaxroute.workload.reading import Reading


@dataclass(frozen=True)
class Trace:
    """A recorded trace of T requests, in order of arrival."""

    times: np.ndarray  # float64 [T], seconds since the first arrival, ascending
    prompt_tokens: np.ndarray  # int32 [T], at least 1
    output_tokens: np.ndarray  # int32 [T], at least 1
    first_time: float  # seconds, the first arrival on the clock of the file
    reading: Reading | None = None  # what was read


@dataclass(frozen=True)
class RequestTable:
    """T prompts with the recorded answers of N experts."""

    prompt_tokens: np.ndarray  # int32 [T], at least 1
    output_tokens: np.ndarray  # int32 [T, N], at least 1
    score: np.ndarray  # float64 [T, N], 0 to 1
    predicted_output_tokens: np.ndarray  # int32 [T, N], at least 1
    predicted_score: np.ndarray  # float64 [T, N]
    predictions_made: bool  # some predictions were missing; they are true values with the frozen generator's errors
    tokens_estimated: bool  # some token counts were missing; they are estimated from the texts
    reading: Reading | None = None  # what was read
