"""What `profile: auto` finds from the streams of a server, against the latency model that made them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.serving.measure import BATCHES, PROMPTS, TOKENS, Answer, fit_latency
from tests.reference.engine import DEFAULT_CONFIG, Engine, Request, duration

WAY = 0.004  # s to the server and back


def answers(latency: list[float], prompts: list[int], output: int) -> list[Answer]:
    """The streams of requests that come to an idle server at once."""
    engine = Engine(DEFAULT_CONFIG)
    requests = [Request(str(number), 0.0, prompt, output) for number, prompt in enumerate(prompts)]
    times: dict[str, list[tuple[float, int]]] = {request.id: [] for request in requests}
    engine.waiting.extend(requests)
    now = 0.0
    while engine.running or engine.waiting:
        entries, _ = engine.schedule()
        decodes = sum(request.generated > 0 for request, _ in entries)
        prefill = sum(tokens for _, tokens in entries) - decodes
        now += duration(latency, prefill, decodes, sum(request.computed + tokens for request, tokens in entries))
        for request in engine.compute(entries)[0]:
            times[request.id].append((now + WAY, request.generated))
    return [Answer(request.prompt, 0.0, times[request.id]) for request in requests]


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
