"""The heuristic routers, and the evaluation of routers on the same request streams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.agent.flat_network import FlatNetwork
from jaxroute.agent.trainer import policy_router
from jaxroute.environment.metrics import summarize
from jaxroute.evaluation.episodes import evaluate_routers, for_search
from jaxroute.routers import make_router

LENGTH = 24


def make():
    return jaxroute.make("paper-3", slots=2, episode_length=LENGTH, metrics="exact", penalty="off")


@pytest.fixture(scope="module")
def scenario():
    env, params = make()
    return env, params, jax.jit(env.reset), jax.jit(env.step)


def drop(key, observation, state, params):
    return jnp.int32(state.engines.num_requests.shape[0])


def routers_of(env, params, weight: float, seed: int):
    """Heuristics, a router with a number of its own, and a network with weights of its own."""
    routers = {name: make_router(name, env) for name in ("round_robin", "shortest_queue", "bert_router", "random")}
    routers |= {"drop": drop, "score_minus_load": make_router("score_minus_load", env, weight=weight)}
    network, (observation, _) = FlatNetwork((4,)), env.reset(jax.random.key(0), params)
    return routers | {"trained": policy_router(network, network.init(jax.random.key(seed), observation))}


@pytest.fixture(scope="module")
def results(scenario):
    env, params, _, _ = scenario
    routers = routers_of(env, params, weight=0.05, seed=0)
    return evaluate_routers(env, params, routers, episodes=3, seed=1), routers


def test_another_evaluation_compiles_nothing(results):
    """All made anew and with other values: environment, parameters, routers, a network's weights, seed."""
    env, params = make()
    arrivals = params.workload.arrivals.replace(rate=jnp.float32(20.0))
    params = params.replace(workload=params.workload.replace(arrivals=arrivals), latency_limit=jnp.float32(0.02))
    routers = routers_of(env, params, weight=0.5, seed=1)
    events = []
    note = lambda event, seconds, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        values = evaluate_routers(env, params, routers, episodes=3, seed=2)
        assert [event for event in events if "/compile/" in event] == []
        jax.jit(lambda x: x + 1)(0)
        assert [event for event in events if "/compile/" in event] != []
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    before, _ = results
    for name in before.keys() - {"drop"}:
        assert values[name]["qos"].mean() < before[name]["qos"].mean()


def state_with(scenario, queues: list[int], step: int = 0):
    env, params, reset, _ = scenario
    _, state = reset(jax.random.key(0), params)
    engines = state.engines.replace(num_requests=jnp.asarray(queues, jnp.int32))
    request = state.request.replace(predicted_score=jnp.asarray([0.5, 0.9, 0.7], jnp.float32))
    return state.replace(engines=engines, request=request, step=jnp.int32(step))


@pytest.mark.parametrize(
    ("name", "queues", "step", "expected"),
    [
        ("round_robin", [0, 0, 0], 0, 0),
        ("round_robin", [0, 0, 0], 5, 2),
        ("round_robin", [0, 0, 2], 5, 0),  # a full expert's turn passes on
        ("round_robin", [2, 2, 2], 5, 2),  # all full: rejected where its turn is
        ("shortest_queue", [1, 0, 0], 0, 1),
        ("shortest_queue", [1, 1, 1], 0, 0),
        ("bert_router", [0, 1, 0], 0, 1),
        ("bert_router", [0, 2, 0], 0, 2),
        ("bert_router", [2, 2, 2], 0, 1),
    ],
)
def test_choices_of_the_heuristics(scenario, name, queues, step, expected):
    env, params, _, _ = scenario
    action = make_router(name, env)(jax.random.key(0), None, state_with(scenario, queues, step), params)
    assert action == expected and action.dtype == jnp.int32


def test_random_takes_every_allowed_expert_alike(scenario):
    env, params, _, _ = scenario
    router = make_router("random", env)
    state = state_with(scenario, [0, 2, 0])
    actions = jax.vmap(lambda key: router(key, None, state, params))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(actions, minlength=3)
    assert counts[1] == 0 and abs(counts[0] - 1000) < 100 and counts.sum() == 2000


def test_every_router_meets_the_same_requests(scenario):
    """One router draws from its key, the other does not."""
    env, _, _, _ = scenario
    prompts = {"random": [], "round_robin": []}
    for name, seen in prompts.items():
        choose = make_router(name, env)

        def router(key, observation, state, params, choose=choose, seen=seen):
            seen.append(int(state.request.prompt_tokens))
            return choose(key, observation, state, params)

        replayed(scenario, router, seed=1, episode=0)
    assert prompts["random"] == prompts["round_robin"]
    assert len(set(prompts["random"])) > LENGTH / 2


def replayed(scenario, router, seed: int, episode: int) -> dict[str, np.ndarray]:
    """One episode of the evaluation, step by step."""
    env, params, reset, step = scenario
    env_key, router_key = jax.random.split(jax.random.split(jax.random.key(seed), 3)[episode])
    observation, state = reset(jax.random.fold_in(env_key, LENGTH), params)
    for index in range(LENGTH):
        action = router(jax.random.fold_in(router_key, index), observation, state, params)
        key = jax.random.fold_in(env_key, index)
        observation, state, _, _, truncated, info = step(key, state, action, params)
    assert truncated
    return jax.device_get(summarize(info["episode"], "exact"))


def test_evaluation_equals_episodes_step_by_step(scenario, results):
    values, routers = results
    for name in ("shortest_queue", "random"):
        expected = replayed(scenario, routers[name], seed=1, episode=2)
        for metric, value in expected.items():
            np.testing.assert_allclose(values[name][metric][2], value, rtol=1e-5, err_msg=metric)


def test_evaluation_of_a_router_that_drops_everything(results):
    values, _ = results
    assert (values["drop"]["drop_rate"] == 1).all() and (values["drop"]["qos"] == 0).all()
    assert np.isnan(values["drop"]["latency_per_token"]).all()


def test_heuristics_never_drop_and_full_slots_show_as_rejections(results):
    values, _ = results
    for name in ("round_robin", "shortest_queue", "bert_router", "random"):
        assert (values[name]["drop_rate"] == 0).all()
    assert values["bert_router"]["full_rejection_rate"].max() > 0
    assert values["round_robin"]["qos"].shape == (3,) and values["round_robin"]["expert_share"].shape == (3, 3)


@dataclass(frozen=True)
class OwnState(jaxroute.Wrapper):
    def reset(self, key, params):
        observation, state = self.env.reset(key, params)
        return observation, {"inner": state}


def test_wrapped_environments_are_evaluated_or_refused_in_a_line(scenario):
    env, params, _, _ = scenario
    env = dataclasses.replace(env, episode_length=4)
    routers: Any = {"round_robin": make_router("round_robin", env)}
    values = [
        evaluate_routers(each, params, routers, episodes=1, seed=1)["round_robin"]["qos"]
        for each in (env, jaxroute.FiveValues(jaxroute.Wrapper(env)))
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    for other, problem in ((OwnState(env), "the state of OwnState is a dict"), (object(), "not on object")):
        with pytest.raises(jaxroute.UserError, match=problem):
            evaluate_routers(other, params, routers, episodes=1, seed=1)


@pytest.mark.parametrize("length", [1500, 1000, 24, 9000])
def test_searches_meet_the_disturbances_of_whole_episodes(length: int):
    """A policy searched in episodes that end before an expert slows down would lose when it does."""
    env, params = jaxroute.make("slowdown-3")
    short, found = for_search(env, params, length)
    of_length, wanted = jaxroute.make("slowdown-3", episode_length=min(length, env.episode_length))
    assert short == dataclasses.replace(of_length, metrics="histogram", penalty="off")
    np.testing.assert_allclose(found.disturbances.starts, wanted.disturbances.starts, atol=1)
    np.testing.assert_array_equal(found.disturbances.slowness, wanted.disturbances.slowness)
