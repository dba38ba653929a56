"""Registered environments: what is in them, schedules over an episode, one's own, and clusters from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.__main__ import main
from jaxroute.environment import registry
from jaxroute.environment.disturbances import FAILED, Disturbances
from jaxroute.environment.observation import ARRIVED_FEATURES, EXPERT_FEATURES, REQUEST_FEATURES
from jaxroute.environment.registry import make_params
from jaxroute.errors import UserError
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.workload import MarkovArrivals, TraceArrivals
from tests.rollouts import CHEAP_COMPILE

NEED_A_FILE = {"azure", "cluster"}
CLUSTER = """
experts:
  - {name: small, mean_score: 0.6, latency: [0.01, 3e-5, 3.0e-5, 3e-7], kv_blocks: 500, max_num_seqs: 16}
  - {name: large, mean_score: 0.8, latency: [0.02, 6e-5, 6e-5, 6e-7, 256, 3e-5], kv_blocks: 900}
rate: 5
latency_limit: 0.04
"""


def test_every_environment_can_be_made_and_stepped():
    for name, description in jaxroute.environments().items():
        assert description and len(description) <= 110 and "\n" not in description
        if name in NEED_A_FILE:
            continue
        env, params = jaxroute.make(name, metrics="off", penalty="off", slots=3, episode_length=30)
        assert (env.slots, env.episode_length) == (3, 30)
        _, state = jax.eval_shape(env.reset, jax.random.key(0), params)
        after = jax.eval_shape(env.step, jax.random.key(0), state, jnp.int32(0), params)[1]
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        )


def test_the_papers_environments_are_what_they_were():
    """`make_params` of the experts and nothing else: 5,000 requests, 48 slots, no schedule."""
    for name, count in (("paper-3", 3), ("paper-6", 6)):
        env, params = jaxroute.make(name)
        assert env == registry.RoutingEnvironment(num_experts=count) and params.disturbances is None
        jax.tree.map(np.testing.assert_array_equal, params, make_params(list(EXPERTS)[:count]))


def test_bursts_keep_the_papers_mean_rate():
    arrivals = jaxroute.make("bursts-3")[1].workload.arrivals
    assert isinstance(arrivals, MarkovArrivals)
    assert float(arrivals.rates @ arrivals.durations / arrivals.durations.sum()) == pytest.approx(3.0)


def test_the_list_of_commands_and_environments(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, description in jaxroute.environments().items():
        assert name in printed and description in printed
    assert "train" in printed and max(map(len, printed.splitlines())) <= 125


# An episode that changes


@pytest.fixture(scope="module")
def scheduled():
    """The same 30 requests to expert 0, without a schedule and with two: slow or hanging at decisions 10 to 19, while
    scores fall to a half in one of them. Each leaf [3, 30, ...]."""
    env, params = jaxroute.make("paper-3", slots=20, queue_nodes=1, episode_length=30, metrics="off", penalty="off")
    arrivals = params.workload.arrivals.replace(rate=jnp.asarray(0.5))
    params = params.replace(workload=params.workload.replace(arrivals=arrivals))
    ones = np.ones(3)
    rows = [(1, 1), (3, 0.5), (FAILED, 1)]

    def with_rows(slowness: float, quality: float) -> Any:
        starts, first = [0, 10, 20], np.array([1.0, 0, 0])
        slow, good = (np.stack([ones, ones + (factor - 1) * first, ones]) for factor in (slowness, quality))
        return params.replace(disturbances=Disturbances.create(starts, slow, good))

    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(with_rows(*row) for row in rows))

    def rollout(params):
        observation, state = env.reset(jax.random.key(0), params)

        def step(carry, key):
            observation, state = carry
            after, following, reward, *_ = env.step(key, state, jnp.int32(0), params)
            return (after, following), (observation, state, env.observe(state, params), reward)

        return jax.lax.scan(step, (observation, state), jax.random.split(jax.random.key(1), 33))[1]

    return jax.device_get(jax.jit(jax.vmap(rollout), compiler_options=CHEAP_COMPILE)(batch))


def test_an_experts_speed_shows_and_matters(scheduled):
    observation, state, observed, reward = scheduled
    time = observation.expert[..., 0, 3] / (1 - observation.expert[..., 0, 3])  # unsquashed, over the limit
    idle = state.engines.num_requests[..., 0] == 0
    for row, slowness in ((1, 3.0), (2, FAILED)):
        # Up to decision 10 all is the same but the speed, from which on it is not.
        np.testing.assert_allclose(time[row, :10], time[0, :10], rtol=1e-5)
        np.testing.assert_allclose(time[row, 10], slowness * time[0, 10], rtol=0.01)
        recovered = idle[row] & (np.arange(33) >= 20)
        np.testing.assert_allclose(time[row, recovered], time[0, 0], rtol=0.01)
        assert recovered.any()
        np.testing.assert_allclose(observation.expert[row, :, 1:, 3], observation.expert[0, :, 1:, 3], rtol=1e-5)
    # At three times 15 ms an iteration none is below 30 ms a token; a hanging expert serves none at all.
    assert reward[0, 11:19].sum() > 2 and (reward[1:, 12:19] == 0).all() and (reward[1:, 23:29] > 0).any(axis=1).all()
    assert state.engines.num_requests[2, 19, 0] >= 8
    np.testing.assert_allclose(observation.expert, observed.expert, rtol=1e-5, atol=1e-6)


def test_quality_changes_behind_the_predictions(scheduled):
    _, state, _, _ = scheduled
    request, decision = state.request, np.arange(33)
    factor = np.where((decision >= 10) & (decision < 20), 0.5, 1.0)
    np.testing.assert_allclose(request.score[1, :, 0], request.score[0, :, 0] * factor, rtol=1e-6)
    np.testing.assert_array_equal(request.score[1, :, 1:], request.score[0, :, 1:])
    np.testing.assert_array_equal(request.predicted_score[1], request.predicted_score[0])


@pytest.mark.parametrize(
    ("starts", "slowness", "quality", "words"),
    [
        ([1, 2], [[1.0], [1.0]], None, "ascending order from 0"),
        ([0, 5, 5], [[1.0]] * 3, None, "ascending"),
        ([0, 5], [[1.0]], None, "a row for each of 2 starts"),
        ([0], [[1.0, 1.0]], [[1.0]], "a factor for each expert"),
        ([0], [[0.0]], None, "above 0"),
        ([0], None, [[-1.0]], "0 or more"),
        ([0], None, None, "slowness or quality"),
    ],
)
def test_bad_schedules_are_one_clear_line(starts, slowness, quality, words):
    with pytest.raises(UserError, match=words):
        Disturbances.create(starts, slowness, quality)


# One's own


def test_ones_own_environment(monkeypatch):
    monkeypatch.setattr(registry, "_ENVIRONMENTS", dict(registry._ENVIRONMENTS))

    def factory(**options):
        env, params = jaxroute.make("paper-3", **options)
        return jaxroute.FiveValues(dataclasses.replace(env, drop=False)), params

    jaxroute.register("mine", factory, "no request may be dropped")
    env, _ = jaxroute.make("mine", slots=7)
    assert env.slots == 7 and not env.drop and jaxroute.environments()["mine"] == "no request may be dropped"
    for name, line, words in (("mine", "a line", "registered already"), ("other", "two\nlines", "one line")):
        with pytest.raises(UserError, match=words):
            jaxroute.register(name, factory, line)


def test_recorded_arrivals(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_time,prompt_len,output_len\n0,10,5\n1,20,5\n3,30,5\n")
    env, params = jaxroute.make("azure", path=path, rate_scale=2.0, slots=9)
    assert env.slots == 9 and isinstance(params.workload.arrivals, TraceArrivals)
    assert float(params.workload.arrivals.rate_scale) == 2
    with pytest.raises(UserError, match='make."azure", path='):
        jaxroute.make("azure")


def test_a_cluster_from_a_file(tmp_path):
    path = tmp_path / "experts.yaml"
    path.write_text(CLUSTER)
    env, params = jaxroute.make("cluster", path=str(path), slots=9)
    assert (env.num_experts, env.slots) == (2, 9)
    np.testing.assert_allclose(params.engines.latency.per_prefill_token, [3e-5, 6e-5])
    np.testing.assert_allclose(params.engines.latency.per_token_above_knee, [0, 3e-5])
    np.testing.assert_array_equal(params.engines.usable_blocks, [500, 900])
    np.testing.assert_array_equal(params.engines.max_num_seqs, [16, 256])
    np.testing.assert_allclose(params.workload.requests.score_mean, [0.6, 0.8])
    assert float(params.latency_limit) == pytest.approx(0.04) and float(params.workload.arrivals.rate) == 5


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("experts:", "expert:", "expert.*experts"),
        ("kv_blocks: 500", "kv_block: 500", r"experts\[0\].*kv_block.*kv_blocks"),
        ("kv_blocks: 500, ", "", r"experts\[0\]: kv_blocks is missing"),
        ("kv_blocks: 500", "kv_blocks: 1.5", "kv_blocks must be a whole number"),
        ("latency: [0.01, ", "latency: [", r"experts\[0\]: latency must be"),
        ("mean_score: 0.6", "mean_score: 6", "mean scores"),
        ("mean_score: 0.6", "mean_score: good", r"experts\[0\]: mean_score must be a number above 0"),
        ("rate: 5", "rate: -1", "rate must be a number above 0"),
        ("experts:", "experts: [", "line 3: not YAML"),
    ],
)
def test_a_bad_cluster_is_one_clear_line(tmp_path, old, new, words):
    path = tmp_path / "experts.yaml"
    path.write_text(CLUSTER.replace(old, new))
    with pytest.raises(UserError, match=words) as error:
        jaxroute.make("cluster", path=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_cluster_without_its_file():
    with pytest.raises(UserError, match="cannot be read"):
        jaxroute.make("cluster", path="/nowhere/experts.yaml")
    with pytest.raises(UserError, match="needs a file"):
        jaxroute.make("cluster")


def test_the_page_of_the_contract_is_right(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "environment.md").read_text()
    path = tmp_path / "experts.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    env, params = jaxroute.make("cluster", path=path)
    assert env.num_experts == 2 and float(params.workload.arrivals.rate) == 20
    orders = {"`arrived` is": ARRIVED_FEATURES, "`expert` is": EXPERT_FEATURES, "A request is": REQUEST_FEATURES}
    words = " ".join(page.split())
    for beginning, features in orders.items():
        assert f"{beginning} " + ", ".join(f"`{name}`" for name in features) + "." in words
    for name in jaxroute.environments():
        assert f"`{name}`" in page
