"""Random clusters: drawn by number, of one structure, with loads around what a cluster serves; and their requests."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

import jaxroute
from jaxroute.environment.random_clusters import HELD_OUT, random_cluster
from jaxroute.evaluation.episodes import run_episodes
from jaxroute.routers import make_router
from jaxroute.testing import check_env
from jaxroute.workload import LognormalRequests, PoissonArrivals, Workload
from tests.test_workload import stream

COUNT = 40_000


def lognormal(**changes: float) -> LognormalRequests:
    values = {
        "log_prompt_mean": 5.0,
        "log_prompt_std": 0.6,
        "log_output_mean": [5.0, 5.5],
        "log_output_std": 0.5,
        "output_shared": 0.3,
        "length_known": 0.6,
        "score_mean": [0.5, 0.6],
        "score_shared_std": 0.03,
        "score_std": 0.06,
        "score_known": 0.4,
    } | changes
    arrays = {name: jnp.asarray(value, float) for name, value in values.items()}
    return LognormalRequests(**arrays, most_prompt_tokens=jnp.int32(100_000), most_output_tokens=jnp.int32(100_000))


@pytest.mark.parametrize("known", [0.0, 0.6, 1.0])
def test_lengths_and_scores_are_as_described_and_predicted(known: float):
    workload = Workload.create(PoissonArrivals.create(1.0), lognormal(length_known=known, score_known=known))
    request = stream(workload, 0, COUNT)[1]
    prompt, output = np.log(request.prompt_tokens), np.log(request.output_tokens)
    # Rounded lengths: away from a hundred tokens a step of one is below the resolution of the test.
    assert kstest((prompt - 5.0) / 0.6, "norm").statistic < 0.01
    np.testing.assert_allclose(output.mean(0), [5.0, 5.5], atol=0.01)
    np.testing.assert_allclose(output.std(0), 0.5, atol=0.01)
    assert np.corrcoef(output.T)[0, 1] == pytest.approx(0.3, abs=0.02)
    assert np.corrcoef(prompt, output[:, 0])[0, 1] == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(request.score.mean(0), [0.5, 0.6], atol=0.005)
    np.testing.assert_allclose(request.score.std(0), np.hypot(0.03, 0.06), atol=0.002)
    for truth, prediction in (
        (output[:, 0], np.log(request.predicted_output_tokens[:, 0])),
        (request.score[:, 0], request.predicted_score[:, 0]),
    ):
        error = truth - prediction
        assert 1 - error.var() / truth.var() == pytest.approx(known, abs=0.02)
        if 0 < known < 1:  # a prediction is the mean of what is predicted
            assert np.polyfit(prediction, truth, 1)[0] == pytest.approx(1, abs=0.03)


def test_long_requests_are_cut():
    requests = lognormal().replace(most_prompt_tokens=jnp.int32(90), most_output_tokens=jnp.int32(70))
    request = stream(Workload.create(PoissonArrivals.create(1.0), requests), 0, 500)[1]
    assert request.prompt_tokens.max() == 90 and request.output_tokens.max() == 70
    assert request.predicted_output_tokens.max() == 70 and request.prompt_tokens.min() >= 1


def test_a_number_is_a_cluster_and_all_have_one_structure():
    clusters = [random_cluster(number, 5, 64, 1000) for number in range(40)]
    again = random_cluster(7, 5, 64, 1000)
    jax.tree.map(np.testing.assert_array_equal, again, clusters[7])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clusters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stacked))
    experts = (np.asarray(stacked.engines.max_model_len) > 0).sum(1)
    assert set(experts) == {1, 2, 3, 4, 5}
    assert len(set(np.asarray(stacked.latency_limit).tolist())) == 40
    held_out = random_cluster(HELD_OUT, 5, 64, 1000)
    assert float(held_out.latency_limit) not in np.asarray(stacked.latency_limit)
    two = random_cluster(7, 5, 64, 1000, two_limits=True)
    assert float(two.ttft_limit) > float(two.tpot_limit) > 0


def test_no_request_is_sent_to_an_empty_place_and_loads_are_around_what_is_served():
    """Under Shortest Queue First most requests are served in time where the load is low."""
    env, _ = jaxroute.make("random-cluster", episode_length=300, num_experts=4, metrics="exact", penalty="off")
    clusters = [random_cluster(number, 4, env.slots, 300) for number in range(20)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clusters)
    router = make_router("shortest_queue", env)

    def met(cluster):
        return run_episodes(env, [router], jnp.int32(0), jax.random.key(0)[None], cluster)

    metrics = jax.jit(lambda stacked: jax.lax.map(met, stacked))(stacked)
    there = np.asarray(stacked.engines.max_model_len) > 0
    # Rules choose among all where the action mask allows none, and such a request is rejected.
    share, rejected = (np.asarray(metrics[f"expert_{name}"])[:, 0] for name in ("share", "rejection_rate"))
    assert (share[there] > 0).any() and (rejected[~there & (share > 0)] == 1).all()
    qos = np.asarray(metrics["qos"])[:, 0]
    assert (qos > 0.2).mean() > 0.4 and (qos < 0.95).all()


def test_it_keeps_the_contract():
    check_env(*jaxroute.make("random-cluster", number=3, num_experts=3, episode_length=40))


@pytest.mark.parametrize("number", [-1, 1.5, True, "a"])
def test_a_bad_number_is_one_clear_line(number):
    with pytest.raises(jaxroute.UserError, match="number of a random cluster"):
        jaxroute.make("random-cluster", number=number)
    with pytest.raises(jaxroute.UserError, match="two_limits of a random cluster"):
        jaxroute.make("random-cluster", number=np.int64(3), two_limits="no")


@pytest.mark.parametrize(("number", "wanted"), [(0, "d2ab1db6065d99ec"), (HELD_OUT, "0d610d1724cde7d7")])
def test_a_number_stays_the_same_cluster(number: int, wanted: str):
    """All numbers of its parameters to five digits: results that name a number mean this cluster."""
    params = random_cluster(number, 6, 64, 5000)
    numbers = {
        jax.tree_util.keystr(path): [f"{value:.5g}" for value in np.asarray(leaf, float).ravel()]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16] == wanted
