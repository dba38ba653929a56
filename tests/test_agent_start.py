"""The linear policy that training starts from, and the validation of greedy policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.agent.router_network import RouterNetwork, with_linear_policy
from jaxroute.agent.start import Validator, linear_start, spread_rows
from jaxroute.agent.trainer import policy_router
from jaxroute.environment.observation import EXPERT_FEATURES
from jaxroute.runs.search_log import SearchLog

NETWORK = RouterNetwork(hidden=8, heads=2, layers=1, mlp=(8,))


@pytest.fixture(scope="module")
def small():
    return jaxroute.make("overload-3", slots=16, episode_length=60, queue_nodes=4)


def test_the_first_policy_is_the_linear_one(small):
    env, params = small
    keys = jax.random.split(jax.random.key(0), 64)
    observation, _ = jax.jit(jax.vmap(env.reset, (0, None)))(keys, params)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=len(EXPERT_FEATURES) + 1), jnp.float32)
    first = jax.tree.map(lambda leaf: leaf[0], observation)
    variables = with_linear_policy(jax.jit(NETWORK.init)(jax.random.key(1), first), 20 * weights)
    router = policy_router(NETWORK, variables)
    ours = jax.jit(jax.vmap(lambda seen: router(None, seen, None, None)))(observation)
    values = np.concatenate([observation.expert @ weights[:-1], np.full((64, 1), weights[-1])], axis=1)
    best, second = np.sort(np.where(observation.action_mask, values, -np.inf), axis=1).T[[-1, -2]]
    clear = best - second > 0.05  # the perceptron adds almost 0
    assert clear.sum() > 20
    np.testing.assert_array_equal(np.asarray(ours)[clear], values.argmax(axis=1)[clear])


def test_the_search_improves_and_repeats_itself(small):
    env, params = small
    reports = []
    a_generation = 24 * 2 * 60  # policies, episodes, requests
    found = [
        linear_start(env, params, None, 12 * a_generation, seed=3, done=lambda *r: reports.append(r)) for _ in range(2)
    ]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (len(EXPERT_FEATURES) + 1,) and np.isfinite(found[0]).all()
    decisions, qos = np.array([report[:2] for report in reports[:12]]).T
    np.testing.assert_array_equal(decisions, a_generation * np.arange(1, 13))
    assert qos[-4:].mean() > qos[:4].mean()


def test_a_stopped_search_goes_on_from_its_log(small, tmp_path):
    env, params = small
    decisions = 6 * 24 * 2 * 60
    whole = linear_start(env, params, None, decisions, 3)

    def stop_after(simulated: int) -> Callable[..., None]:
        def done(*report: Any) -> None:
            log.write(*report)
            if report[0] >= simulated:
                raise InterruptedError

        return done

    for simulated in (decisions // 3, decisions // 2):
        with SearchLog(tmp_path) as log, pytest.raises(InterruptedError):
            linear_start(env, params, None, decisions, 3, stop_after(simulated), known=log.known)
    file = tmp_path / "search.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 3
    file.write_text("\n".join([*lines, lines[0][:30]]))  # killed while it wrote
    with SearchLog(tmp_path) as log:
        assert len(log.known) == 3 and all(len(values) == 24 for values in log.known)
        np.testing.assert_array_equal(linear_start(env, params, None, decisions, 3, log.write, known=log.known), whole)
    assert len(file.read_text().splitlines()) == 6


def test_the_generations_of_a_search_have_every_training_environment():
    """With the same middle ones in each, a policy for 1 to 8 requests/s was never tried at 8."""
    generations = [spread_rows(64, 5, generation) for generation in range(25)]
    assert set(np.concatenate(generations)) == set(range(64))
    for rows in generations:
        assert len(rows) == 5 and (np.diff(rows) >= 12).all() and rows[-1] < 64  # one of each fifth
    np.testing.assert_array_equal(spread_rows(1, 2, 3), [0, 0])


def test_validation_tells_good_from_bad(small):
    env, params = small
    validator = Validator(env, params, None, decisions=4 * 60)  # as below, so that a program is compiled once
    observation, _ = jax.jit(env.reset)(jax.random.key(0), params)
    variables = jax.jit(NETWORK.init)(jax.random.key(1), observation)
    zero = jnp.zeros(len(EXPERT_FEATURES) + 1)
    drops = policy_router(NETWORK, with_linear_policy(variables, zero.at[-1].set(50.0)))
    serves = policy_router(
        NETWORK, with_linear_policy(variables, zero.at[EXPERT_FEATURES.index("expected_qos")].set(50.0))
    )
    assert validator.qos(drops) == 0
    assert validator.qos(serves) > 0.4


def test_environments_that_differ_are_all_validated(small):
    """Leaves with a row for each training environment: slow arrivals at one end and an overload at the other."""
    env, params = small
    axes = jax.tree.map(lambda _: None, params)
    arrivals = params.workload.arrivals
    rates = jnp.linspace(0.5, 30, 8)
    many = params.replace(workload=params.workload.replace(arrivals=arrivals.replace(rate=rates)))
    axes = axes.replace(workload=axes.workload.replace(arrivals=arrivals.replace(rate=0)))
    observation, _ = jax.jit(env.reset)(jax.random.key(0), params)
    weights = jnp.zeros(len(EXPERT_FEATURES) + 1).at[EXPERT_FEATURES.index("predicted_score")].set(50.0)
    router = policy_router(NETWORK, with_linear_policy(jax.jit(NETWORK.init)(jax.random.key(1), observation), weights))
    mixed = Validator(env, many, axes, decisions=4 * 60).qos(router)
    alone = [
        Validator(
            env,
            jaxroute.make("overload-3")[1].replace(
                workload=params.workload.replace(arrivals=arrivals.replace(rate=rate))
            ),
            None,
            decisions=4 * 60,
        ).qos(router)
        for rate in (0.5, 30.0)
    ]
    assert alone[1] < mixed < alone[0]
