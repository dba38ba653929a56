"""Environments in which prompts share prefixes, in float64, against the plain Python cluster, whose engines run
block by block (`tests.reference.caching`); and what the router knows of the caches.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.observation import EXPERT_FEATURES
from jaxroute.environment.step import prefix_share
from jaxroute.errors import UserError
from jaxroute.workload import ConversationRequests, PoissonArrivals, Tokens, Workload
from tests.reference.cluster import Cluster
from tests.rollouts import batch_of_runs, configs_of, same_qos_and_timings, with_engines, worth_of

EPISODE, SLOTS, RECORD, PATIENCE = 400, 16, 60, 1.5


@pytest.fixture(scope="module")
def case():
    """Conversations on three engines, one with much less memory than they need; some clients give up."""
    rng = np.random.default_rng(3)
    actions = rng.choice(4, EPISODE, p=[0.3, 0.3, 0.35, 0.05])
    with jax.enable_x64(True):
        options = {"slots": SLOTS, "episode_length": EPISODE, "metrics": "exact", "penalty": "off"}
        env, params = jaxroute.make("chat-3", prefix_record=RECORD, **options)
        params = with_engines(params, usable_blocks=[28, 45, 200], max_num_seqs=[64, 64, 5])
        requests = ConversationRequests.create(
            [40, 100], [1, 1], 5.0, Tokens.create(20, 0.5), Tokens.create(20, 0.5), [0.7] * 3, 300, 100
        )
        params = params.replace(workload=Workload.create(PoissonArrivals.create(35.0), requests))
        params = params.replace(prefix_expiry=jnp.asarray(2.0), patience=jnp.asarray(PATIENCE))
        run = batch_of_runs(env, [params], [actions], seed=5)[0]
    cluster = Cluster(configs_of(params.engines), SLOTS, worth_of(params))
    qos, found = [], np.zeros((EPISODE, 3))
    for step in range(EPISODE):
        request = run.request(step)
        for number, expert in enumerate(cluster.experts):
            arriving = expert.new_request(step, cluster.now, request.prompt, request.output[number], request.pieces)
            found[step, number] = len(expert.engine.hits(arriving)) * expert.engine.size
        qos.append(cluster.step(request, int(actions[step]), float(run.info["elapsed"][step])))
    totals = jax.tree.map(lambda leaf: leaf[EPISODE - 1], run.info["episode"])
    drained = cluster.drain()
    return SimpleNamespace(
        env=env, params=params, run=run, cluster=cluster, qos=qos, found=found, drained=drained, totals=totals
    )


def test_qos_of_every_step_and_timings_of_every_request(case):
    experts = case.cluster.experts
    assert sum(expert.preemptions for expert in experts) > 20
    assert sum(expert.engine.pool.evicted for expert in experts) > 100
    assert case.cluster.count("abandoned") > 10
    assert not any(expert.engine.pool.copies for expert in experts)
    same_qos_and_timings(case)
    block_seconds = [expert.block_seconds for expert in experts]
    np.testing.assert_allclose(case.totals.block_seconds, block_seconds, rtol=0.02)


def test_the_estimated_share_is_that_of_what_was_sent_lately(case):
    run, sent, now = case.run, [], 0.0
    for step in range(EPISODE - 1):
        request, action = run.request(step), run.before.step[step]
        shares = np.zeros(3)
        for at, expert, other in sent[-RECORD:]:
            if now - at < 2.0:
                ends = [
                    min(end, other_end, request.prompt, other.prompt)
                    for (owner, end), (other_owner, other_end) in zip(request.pieces, other.pieces, strict=True)
                    if owner == other_owner
                ]
                shares[expert] = max([shares[expert], *(end / request.prompt for end in ends)])
        if step:
            seen = run.observation.expert[step - 1]
            assert seen.shape[-1] == len(EXPERT_FEATURES) + 1
            np.testing.assert_allclose(seen[:, -1], shares, rtol=1e-6)
        fate = case.cluster.fates[step]
        assert action == step
        if fate.served is not None:
            sent.append((now, fate.expert, request))
        now += run.info["elapsed"][step]
    assert run.observation.expert[:, :, -1].max() > 0.5


def test_what_an_expert_is_expected_to_hold_needs_no_prefill(case):
    """The predicted latency is shorter by the prefill of the share, and the chance to meet the limit is not smaller."""
    without = dataclasses.replace(case.env, prefix_share="off")
    before = jax.tree.map(lambda leaf: leaf[1:], case.run.before)
    with jax.enable_x64(True):
        blind = np.asarray(jax.vmap(lambda state: without.observe(state, case.params).expert)(before))
    seen = np.asarray(case.run.observation.expert[: len(blind)])
    latency, qos = EXPERT_FEATURES.index("predicted_latency"), EXPERT_FEATURES.index("expected_qos")
    request, limit = before.request, float(case.params.latency_limit)
    tokens, prompt = np.asarray(request.predicted_output_tokens), np.asarray(request.prompt_tokens)[:, None]
    seconds = [values[..., latency] / (1 - values[..., latency]) * limit * tokens for values in (blind, seen)]
    saved = np.asarray(case.params.engines.latency.per_prefill_token) * prompt * seen[..., -1]
    np.testing.assert_allclose(seconds[0] - seconds[1], saved, rtol=1e-3, atol=1e-4)
    assert (seen[..., qos] >= blind[..., qos] - 1e-6).all() and (seen[..., qos] > blind[..., qos] + 0.01).any()


def test_the_exact_share_is_what_an_engine_would_find(case):
    exact = dataclasses.replace(case.env, prefix_share="exact")
    with jax.enable_x64(True):
        shares = jax.vmap(lambda state: prefix_share(exact, state, case.params))(case.run.before)
    prompts = np.asarray(case.run.before.request.prompt_tokens)[:, None]
    np.testing.assert_allclose(shares * prompts, case.found, rtol=1e-6)
    assert case.found.max() > 100


def test_a_share_needs_prefixes():
    env, params = jaxroute.make("paper-3", prefix_share="estimated")
    with pytest.raises(UserError, match="prefix_share=estimated needs requests with prefixes, as in chat-3"):
        env.reset(jax.random.key(0), params)
    with pytest.raises(UserError, match="unknown prefix_share 'exat'; the nearest are exact"):
        jaxroute.make("chat-3", prefix_share="exat")


def test_the_engines_may_be_without_prefix_caching():
    env, params = jaxroute.make("chat-3", engine="vllm-0.6")
    assert params.engines.prefix_pieces == 0 and env.prefix_share == "estimated"
    jax.eval_shape(env.reset, jax.random.key(0), params)
