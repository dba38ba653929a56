"""The relative features by a plain computation, the universal router, and trainings that start with it."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.agent.router_network import RouterNetwork, with_linear_policy
from jaxroute.commands import train
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.environment.observation import RELATIVE_FEATURES
from jaxroute.environment.random_clusters import random_cluster
from jaxroute.routers import make_router
from jaxroute.routers.linear import UNIVERSAL, linear_policy, linear_values, universal_weights
from tests.test_train import TINY, records, refused


def state_of(env, params, decisions: int = 40):
    def step(carry, index):
        _, state = carry
        observation, state, *_ = env.step(jax.random.key(index), state, index % env.num_experts, params)
        return (observation, state), None

    start = env.reset(jax.random.key(0), params)
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(decisions))[0])()


@pytest.mark.parametrize("name", ["paper-3", "memory-3"])
def test_relative_features_are_what_they_say(name: str):
    """Of each expert, from the requests in its slots one by one, in Python's numbers."""
    env, params = jaxroute.make(name, features="relative", slots=24, queue_nodes=1)
    observation, state = state_of(env, params)
    standard = jaxroute.make(name, slots=24, queue_nodes=1)[0].observe(state, params)
    names = dict(zip(RELATIVE_FEATURES, np.asarray(observation.expert).T, strict=True))
    known = dict(zip(jaxroute.EXPERT_FEATURES, np.asarray(standard.expert).T, strict=True))
    for feature in ("predicted_score", "expected_qos", "impact", "at_risk"):
        np.testing.assert_allclose(names[feature], known[feature], rtol=1e-5, atol=1e-7)

    engines, request, limit = params.engines, state.request, float(params.latency_limit)
    for expert in range(3):
        latency = {key: float(np.asarray(value)[expert]) for key, value in vars(engines.latency).items()}

        def prefill(tokens, latency=latency):
            return latency["per_prefill_token"] * tokens + latency["per_token_above_knee"] * max(
                tokens - latency["knee_tokens"], 0
            )

        prompt, output = int(request.prompt_tokens), int(request.predicted_output_tokens[expert])
        context = prompt + output / 2
        alone = latency["base"] + latency["per_decode"] + latency["per_context_token"] * context
        alone += prefill(prompt) / output
        slack = max(limit - alone, 0.02 * limit)
        joined = known["joined_iteration_time"][expert]
        joined = limit * joined / (1 - joined)
        batch_use = min(max((joined - alone) / slack, 0), 3)

        blocks, waiting, count = 0, 0.0, 0
        for slot in range(24):
            if int(state.engines.position[slot, expert]) >= int(state.engines.num_requests[expert]):
                continue
            count += 1
            generated, own_prompt = (
                int(state.engines.generated[slot, expert]),
                int(state.engines.prompt_tokens[slot, expert]),
            )
            length = max(int(state.queued.predicted_tokens[slot, expert]), generated + 1)
            blocks += math.ceil((own_prompt + length) / 16)
            if int(state.engines.position[slot, expert]) >= int(state.engines.num_running[expert]):
                waiting += prefill(own_prompt + generated)
        blocks += math.ceil((prompt + output) / 16)
        kv_ahead = min(blocks / int(engines.usable_blocks[expert]), 3)
        clock = max(float(state.engines.clock[expert]), 0)
        latency_use = min(max((joined + (clock + waiting + prefill(prompt)) / output - alone) / slack, 0), 3)
        taken = latency["per_decode"] + latency["per_context_token"] * context
        taken = (taken + (latency["per_token_above_knee"] if count + 1 > latency["knee_tokens"] else 0)) / slack
        demand = (output * limit * taken + prefill(prompt) * limit / slack) / 3 / float(state.recent_gap)
        ahead = waiting / (limit * output)
        wanted = {
            "batch_use": batch_use,
            "batch_use_squared": batch_use**2 / 3,
            "latency_use": latency_use,
            "latency_use_squared": latency_use**2 / 3,
            "kv_ahead": kv_ahead,
            "kv_ahead_squared": kv_ahead**2 / 3,
            "demand": demand / (1 + demand),
            "demand_squared": (demand / (1 + demand)) ** 2,
            "impact_by_demand": names["impact"][expert] * demand / (1 + demand),
            "least_latency_use": names["latency_use"].min(),
            "prefill_ahead": ahead / (1 + ahead),
            "slack_taken": 10 * taken / (1 + 10 * taken),
        }
        for feature, value in wanted.items():
            assert names[feature][expert] == pytest.approx(value, rel=2e-3, abs=2e-4), (feature, expert)


def test_relative_features_do_not_depend_on_scales_of_the_configuration():
    env, params = jaxroute.make("rtx4090-3", features="relative", slots=24)
    observation, state = state_of(env, params)
    other = jaxroute.make("rtx4090-3", features="relative", slots=24, queue_nodes=3)[0]
    seen = other.observe(state, params.replace(token_scale=params.token_scale * 7))
    np.testing.assert_allclose(seen.expert, observation.expert, rtol=1e-5)


def test_the_weights_that_are_shipped():
    content = json.loads(UNIVERSAL.read_text())
    assert content["dynamics_version"] == DYNAMICS_VERSION
    assert set(content["weights"]) == {*RELATIVE_FEATURES, "drop"}
    weights = universal_weights((*RELATIVE_FEATURES, "prefix_share"))
    assert weights[-2] == 0 and weights.dtype == np.float32 and np.isfinite(weights).all()
    np.testing.assert_array_equal(np.delete(weights, -2), universal_weights())


def test_the_router_is_its_policy_in_every_environment():
    """It reads the same of a state, whatever is observed; and the experts that it may choose among."""
    env, params = jaxroute.make("overload-3", features="relative", slots=12, queue_nodes=1)
    weights = jnp.asarray(universal_weights())
    observation, state = state_of(env, params, 60)
    wanted = int(linear_policy(weights, None, observation, None, None))  # type: ignore[arg-type]
    for changes in ({}, {"obs": "flat"}, {"features": "relative"}, {"queue_nodes": "all"}):
        own = jaxroute.make("overload-3", slots=12, **changes)[0]
        router = jax.jit(make_router("universal", own))
        assert int(router(jax.random.key(0), own.observe(state, params), state, params)) == wanted
    full = jaxroute.make("overload-3", slots=1, drop=False)
    observation, state = full[0].reset(jax.random.key(0), full[1])
    first = int(make_router("universal", full[0])(jax.random.key(0), observation, state, full[1]))
    _, state, *_ = full[0].step(jax.random.key(1), state, first, full[1])
    second = int(make_router("universal", full[0])(jax.random.key(0), None, state, full[1]))
    assert second not in (first, 3)


def test_it_routes_where_prompts_share_prefixes():
    env, params = jaxroute.make("chat-3", slots=8, episode_length=20)
    observation, state = env.reset(jax.random.key(0), params)
    assert 0 <= int(make_router("universal", env)(jax.random.key(0), observation, state, params)) <= 3


def test_training_environments_are_clusters():
    changes = ["environment.id=random-cluster", "environment.num_experts=3", "training.clusters=3"]
    experiment = build_experiment(load_config(None, [*changes, "training.num_envs=4", "environment.patience=9"]))
    varied, axes = experiment.training_params, experiment.params_axes
    assert varied.latency_limit.shape == (4,) and axes.latency_limit == 0
    assert varied.patience.shape == () and axes.patience is None and axes.credit_discount is None
    for place, number in enumerate((0, 1, 2, 0)):
        alone = random_cluster(number, 3, experiment.env.slots, experiment.env.episode_length)
        of_place = jax.tree.map(lambda leaf, place=place: leaf[place], varied.engines)
        jax.tree.map(np.testing.assert_array_equal, of_place, alone.engines)


@pytest.mark.slow
def test_a_training_on_clusters_that_starts_with_the_universal_router(tmp_path, capsys):
    changes = [
        *("environment.id=random-cluster", "environment.num_experts=2", "training.clusters=4"),
        *("training.start=universal", "training.start_decisions=200", "training.improvement_decisions=0"),
        *("environment.queue_nodes=1", "evaluation.routers=[trained, universal]"),
    ]
    assert train.main([*TINY, *changes, "--out", str(tmp_path / "run")]) == 0
    assert len(records(tmp_path / "run")) == 2
    assert capsys.readouterr().out.count("validated: QoS") == 2  # the universal router, and what the search found


def test_the_universal_start_is_the_universal_policy():
    """Its logits are the linear values, but for what the perceptrons add at first."""
    env, params = jaxroute.make("bursts-3", features="relative", slots=12, queue_nodes=1)
    observation, _ = state_of(env, params, 30)
    network, weights = RouterNetwork(hidden=8, heads=2, layers=1, mlp=(8,)), jnp.asarray(universal_weights())
    variables = with_linear_policy(network.init(jax.random.key(0), observation), weights)
    logits, _ = network.apply(variables, observation)
    np.testing.assert_allclose(logits, linear_values(weights, observation), atol=0.05)


def test_what_it_cannot_start_is_one_clear_line(tmp_path, capsys):
    for changes, words in (
        (["network.kind=flat"], "training.start: universal needs the network han or han_jraph"),
        (["environment.features=standard"], "training.start: universal needs its features"),
    ):
        line = refused(capsys, train.main, *TINY, "training.start=universal", *changes, "--out", tmp_path / "run")
        assert words in line
    cluster = ("environment.id=random-cluster", "training.clusters=2")
    for changes, words in (
        (["training.clusters=2"], "training.clusters: only random-cluster has clusters"),
        (["environment.number=2"], "environment.number: only random-cluster has it"),
        ([*cluster, "training.rate_range=[1, 2]"], "training.clusters: each cluster has its own requests, rate and"),
        (
            [*cluster, "workload.arrivals.kind=poisson", "workload.arrivals.rate=2"],
            "training.clusters: each cluster has",
        ),
        ([*cluster, "training.clusters=9"], "training.clusters: 9 clusters for 4 environments"),
    ):
        assert words in refused(capsys, train.main, *TINY, *changes, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
