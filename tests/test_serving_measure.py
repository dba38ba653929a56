"""What `profile: auto` finds from the streams of a server, against the latency model that made them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.serving.measure import BATCHES, PROMPTS, TOKENS, Answer, fit_latency
from tests.reference.engine import simulate

WAY = 0.004  # s to the server and back


def answers(latency: list[float], prompts: list[int], output: int) -> list[Answer]:
    """The streams of requests that come to an idle server at once."""
    requests = [{"arrival_time": 0.0, "prompt_len": prompt, "output_len": output} for prompt in prompts]
    computed = [0] * len(prompts)
    times: list[list[tuple[float, int]]] = [[] for _ in prompts]
    for record in simulate({"config": {"latency": latency}, "requests": requests})["iterations"]:
        for number, tokens in ((int(name), tokens) for name, tokens in record["sched"].items()):
            computed[number] += tokens
            if computed[number] >= prompts[number]:
                times[number].append((record["t"] + record["dur"] + WAY, len(times[number]) + 1))
    return [Answer(prompt, 0.0, own) for prompt, own in zip(prompts, times, strict=True)]


@pytest.mark.parametrize("latency", [[0.015, 7.2e-5, 5e-5, 2.5e-5], [0.025, 1.5e-4, 4e-4, 2e-6]])
def test_the_coefficients_of_exact_times(latency: list[float]):
    together = [[answers(latency, [prompt] * batch, TOKENS)] for batch, prompt in BATCHES]
    alone = [answers(latency, [prompt], 1) for prompt in PROMPTS]
    np.testing.assert_allclose(fit_latency(together, alone), latency, rtol=1e-6)


def test_too_little_to_find_them():
    with pytest.raises(UserError, match="give its profile"):
        fit_latency([[answers([0.01, 0, 0, 0], [16], TOKENS)]], [])
    with pytest.raises(UserError, match="give its profile"):
        fit_latency([], [])
