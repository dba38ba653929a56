"""The timeline of every registered environment agrees with the environment itself, request by request.

What the environment says of a request is in its totals with `metrics="exact"`: latency per token, TTFT and TPOT by the
request's number, and the counts of an expert. The timeline runs the engines again on the same decisions.
"""

from __future__ import annotations

import csv
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.evaluation import episodes
from jaxroute.timelines.collect import DROPPED, MET, MISSED, REJECTED, Episode, collect

LENGTH = 90
FOUR_EXPERTS = 2  # the number of a random cluster that has them all, and no disturbance
LABELS = {
    "slowdown-3": "iterations take 3 times as long",
    "failure-3": "hangs",
    "quality-3": "scores times 0.6",
}
CLUSTER = """
experts:
  - {name: small, mean_score: 0.6, latency: [0.01, 3e-5, 2e-5, 1e-7], kv_blocks: 60}
  - {name: large, mean_score: 0.8, latency: [0.03, 9e-5, 6e-5, 3e-7], kv_blocks: 90, max_num_seqs: 3}
rate: 12
latency_limit: 0.04
"""


def options_of(name: str, folder) -> dict[str, Any]:
    if name == "random-cluster":
        return {"number": FOUR_EXPERTS, "num_experts": 4}
    if name == "cluster":
        (folder / "experts.yaml").write_text(CLUSTER)
        return {"path": str(folder / "experts.yaml")}
    if name == "azure":
        with (folder / "azure.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
            rows.writerows([f"2023-11-16 18:15:{46 + k // 10}.{k % 10}000000", 100, 20] for k in range(100))
        return {"path": str(folder / "azure.csv")}
    return {}


def some_router(key, observation, state, params):
    """The first expert, which is the disturbed one, more often than not; at times it drops."""
    experts = state.engines.num_requests.shape[0]
    return jnp.where(state.step % 11 == 10, experts, jnp.where(state.step % 3 > 0, 0, state.step % experts))


@pytest.fixture(autouse=True)
def totals_as_metrics(monkeypatch):
    """An episode's `metrics` are then the environment's own totals, with the figures of every request."""
    monkeypatch.setattr(episodes, "summarize", lambda totals, level: totals)


def check(episode: Episode, is_async: bool = False) -> None:
    requests, totals = episode.requests, episode.metrics
    served = requests.fate <= MISSED
    experts = len(episode.experts)
    latency, ttft, tpot = np.asarray(totals.timing_record)
    np.testing.assert_array_equal(served, np.isfinite(latency))
    tokens = requests.output_tokens
    np.testing.assert_allclose(requests.latency_per_token[served], latency[served], rtol=2e-5)
    finish = requests.arrival + latency * tokens
    np.testing.assert_allclose(requests.finish[served], finish[served], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose((requests.first_token - requests.arrival)[served], ttft[served], rtol=1e-4, atol=1e-5)
    several = served & (tokens > 1)
    tpots = (requests.finish - requests.first_token)[several] / (tokens[several] - 1)
    np.testing.assert_allclose(tpots, tpot[several], rtol=1e-4, atol=1e-6)
    of_expert = [requests.expert == expert for expert in range(experts)]
    count = lambda which: [int((which & own).sum()) for own in of_expert]  # noqa: E731
    np.testing.assert_array_equal(count(served), totals.completed)
    np.testing.assert_array_equal(count(requests.fate == MISSED), totals.violations)
    np.testing.assert_array_equal(
        count(requests.fate == REJECTED), np.asarray(totals.rejected_full + totals.rejected_infeasible)
    )
    assert (requests.fate == DROPPED).sum() == totals.dropped
    met = requests.score * (requests.fate == MET)
    np.testing.assert_allclose([met[own].sum() for own in of_expert], totals.qos, rtol=1e-5, atol=1e-6)
    preempted = [requests.preemptions[own & served].sum() for own in of_expert]
    np.testing.assert_array_equal(preempted, totals.preemptions)
    # With asynchronous scheduling, a last batch, whose results are dropped, ends after the last request.
    late = episode.end - float(totals.elapsed)
    assert 0 <= late < 0.1 if is_async else late == pytest.approx(0, abs=1e-5 * episode.end)


@pytest.mark.slow
@pytest.mark.parametrize("name", jaxroute.environments())
def test_every_request_fares_in_the_timeline_as_in_the_environment(name, tmp_path):
    env, params = jaxroute.make(
        name, episode_length=LENGTH, metrics="exact", penalty="off", **options_of(name, tmp_path)
    )
    experts = tuple(f"expert {number}" for number in range(env.num_experts))
    (episode,) = collect(env, params, {"some": some_router}, experts, jax.random.key(7))
    check(episode, params.engines.async_scheduling)
    if name in LABELS:
        (part,) = episode.disturbed
        assert part.expert == 0 and part.start == episode.requests.arrival[LENGTH // 3]
        assert part.end == episode.requests.arrival[2 * LENGTH // 3]
        assert part.label == LABELS[name]
    else:
        assert episode.disturbed == ()
