"""Lengths drawn from the quantiles of public traces, and the environments in which KV memory decides."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm, spearmanr

import jaxroute
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.routers import make_router
from jaxroute.testing import check_env
from jaxroute.workload import PoissonArrivals, QuantileRequests, Request, Workload, load_trace
from jaxroute.workload.trace_lengths import AZURE_CONVERSATION, MOONCAKE_CONVERSATION, Lengths
from tests.test_workload import MEANS, stream

DATA = Path(__file__).parents[2] / "shared" / "data"
COUNT = 40_000
FITTED = {
    "azure_llm_2023_conv.csv": (AZURE_CONVERSATION, 5000, 0.995, (1133, 1138, 0.011), (212, 213, 0.012)),
    "mooncake_conversation.jsonl": (MOONCAKE_CONVERSATION, 8192, 0.537, (3233, 3235, 0.004), (325, 328, 0.008)),
}
"""Most tokens of a request, the share that has no more, and of prompts and outputs the means and the distance, as the
docstring of `trace_lengths` states them."""

MEMORY = ("memory-3", "memory-6", "long-prompts-3")


@pytest.fixture(scope="module", params=[AZURE_CONVERSATION, MOONCAKE_CONVERSATION], ids=["azure", "mooncake"])
def drawn(request) -> tuple[Lengths, Request]:
    lengths = request.param
    workload = Workload.create(PoissonArrivals.create(1.0), QuantileRequests.create(lengths, MEANS))
    return lengths, stream(workload, 0, COUNT)[1]


def cumulative(quantiles: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The distribution function of rounded lengths whose logarithm is linear between the quantiles, at `tokens`."""
    bounds = np.where(np.diff(quantiles, append=np.inf) > 0, np.log(quantiles), np.nan)  # the last of equal ones counts
    known = np.isfinite(bounds)
    levels = np.linspace(0, 1, len(quantiles))
    return np.interp(np.log(tokens + 0.5), bounds[known], levels[known], left=0)


def test_lengths_have_the_fitted_quantiles(drawn):
    lengths, request = drawn
    for tokens, quantiles in ((request.prompt_tokens, lengths[0]), (request.output_tokens[:, 1], lengths[1])):
        assert tokens.dtype == np.int32 and quantiles[0] <= tokens.min() and tokens.max() <= quantiles[-1]
        values, counts = np.unique(tokens, return_counts=True)
        distance = np.abs(np.cumsum(counts) / COUNT - cumulative(quantiles, values)).max()
        assert distance < 1.63 / np.sqrt(COUNT)  # Kolmogorov-Smirnov, the 1 % point
    assert (request.prompt_tokens + request.output_tokens.max(1)).max() <= lengths.most_tokens


def test_outputs_of_one_request_are_alike_and_independent_of_its_prompt(drawn):
    _, request = drawn
    # Normals with a correlation of .5 have a rank correlation of 6 / pi asin(.25).
    assert spearmanr(request.output_tokens[:, 0], request.output_tokens[:, 2])[0] == pytest.approx(0.483, abs=0.015)
    assert abs(spearmanr(request.prompt_tokens, request.output_tokens[:, 0])[0]) < 0.015


def test_predictions_are_within_the_lengths_and_scores_are_the_frozen_ones(drawn):
    lengths, request = drawn
    assert request.predicted_output_tokens.min() >= lengths.output_tokens[0]
    assert request.predicted_output_tokens.max() <= lengths.output_tokens[-1]
    np.testing.assert_allclose(request.score.mean(0), MEANS, atol=0.006)
    np.testing.assert_allclose((request.score - request.predicted_score).std(0), np.hypot(0.04, 0.028), rtol=0.05)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.filterwarnings("ignore:.*spread_ticks")
def test_the_quantiles_are_those_of_the_trace(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here: the data sets lie beside the project, not in it")
    lengths, most, share, *figures = FITTED[name]
    trace = load_trace(DATA / name)
    columns = np.asarray(trace.prompt_tokens), np.asarray(trace.output_tokens)
    kept = columns[0] + columns[1] <= most
    assert kept.mean() == pytest.approx(share, abs=5e-4)
    assert abs(spearmanr(columns[0][kept], columns[1][kept])[0]) < 0.085
    levels = np.linspace(0, 1, 65)
    for tokens, quantiles, (mean, fitted_mean, distance) in zip(columns, lengths, figures, strict=True):
        own = tokens[kept]
        np.testing.assert_array_equal(quantiles, np.quantile(own, levels, method="inverted_cdf"))
        values, counts = np.unique(own, return_counts=True)
        gap = np.abs(np.cumsum(counts) / len(own) - cumulative(quantiles, values)).max()
        grid = np.arange(quantiles[0], quantiles[-1] + 1)
        fitted = np.sum(grid * np.diff(cumulative(quantiles, grid), prepend=0))
        assert gap == pytest.approx(distance, abs=5e-4)
        assert (own.mean(), fitted) == (pytest.approx(mean, abs=0.5), pytest.approx(fitted_mean, abs=0.5))


def test_normals_have_their_level():
    """The whole path from uniforms to lengths equals NumPy's interpolation; predictions have the frozen error."""
    requests = QuantileRequests.create(AZURE_CONVERSATION, [0.5])
    uniforms = np.random.default_rng(0).uniform(size=(200, requests.draws)).astype(np.float32)
    got = jax.vmap(lambda row: requests.sample(row, jnp.int32(0)))(uniforms)
    a, _, c, _, _, z = norm.ppf(uniforms.astype(np.float64)).T
    levels = np.linspace(0, 1, 65)
    wanted = [
        np.exp(np.interp(norm.cdf(normal), levels, np.log(quantiles)))
        for normal, quantiles in zip((a, (c + z) / np.sqrt(2)), AZURE_CONVERSATION, strict=True)
    ]
    wanted.append(np.clip(wanted[1] * np.exp(-0.15 * z), *AZURE_CONVERSATION.output_tokens[[0, -1]]))
    columns = got.prompt_tokens, got.output_tokens[:, 0], got.predicted_output_tokens[:, 0]
    for tokens, values in zip(columns, wanted, strict=True):
        np.testing.assert_allclose(tokens, values, atol=0.51, rtol=1e-4)


# The environments


@pytest.mark.parametrize("name", MEMORY)
def test_every_request_fits_every_engine(name):
    _, params = jaxroute.make(name)
    requests = params.workload.requests
    longest = round(float(jnp.exp(requests.log_prompt[-1]))) + round(float(jnp.exp(requests.log_output[-1])))
    assert longest < int(params.engines.max_model_len.min())
    assert longest <= 16 * int(params.engines.usable_blocks.min())
    mean = (jnp.exp(requests.log_prompt[1:]) + jnp.exp(requests.log_prompt[:-1])).mean() / 2
    assert mean > 1000


@pytest.mark.parametrize("name", MEMORY)
def test_shortest_queue_first_preempts_at_the_default_load(name):
    """In more than 5 of 100 requests, and the KV caches are full for much of the time."""
    env, params = jaxroute.make(name, episode_length=1000)
    values = evaluate_routers(env, params, {"shortest_queue": make_router("shortest_queue", env)}, 4, seed=0)
    values = values["shortest_queue"]
    assert values["preemptions"].mean() > 0.05 * 1000
    assert values["kv_use"].mean() > 0.5 and values["rejection_rate"].mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORY)
def test_the_environments_keep_their_contract(name):
    check_env(*jaxroute.make(name, slots=8, queue_nodes=2, episode_length=40, obs="flat", metrics="off", penalty="off"))
