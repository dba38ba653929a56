"""`check_env` accepts a sound environment and names what is wrong with each broken one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxroute.environment.registry import make_params
from jaxroute.environment.spaces import Box, Dict, Discrete
from jaxroute.environment.state import EnvParams, EnvState, QueuedRequests
from jaxroute.environment.wrappers import FiveValues, Wrapper
from jaxroute.simulator.engine import empty_engine
from jaxroute.testing import ContractError, check_env
from jaxroute.workload import PoissonArrivals, RequestTable, TableRequests, Workload

TABLE = RequestTable(
    prompt_tokens=np.arange(1, 6),
    output_tokens=np.arange(10, 20).reshape(5, 2),
    score=np.linspace(0.5, 0.9, 10).reshape(5, 2),
    predicted_output_tokens=np.full((5, 2), 12),
    predicted_score=np.linspace(0.6, 0.8, 10).reshape(5, 2),
    predictions_made=False,
    tokens_estimated=False,
)
PARAMS = make_params(
    ["alpaca-native", "chatglm-6b"],
    penalty_weight=-1.0,
    workload=Workload.create(PoissonArrivals.create(3.0), TableRequests.create(TABLE)),
)
TRACED = (
    "far out of its range",
    "no action allowed",
    "arriving truth observed",
    "queued truth observed",
    "state not fresh",
    "no end",
    "NaN",
    "infinite reward",
    "done for truncated",
    "both ends",
    "no auto-reset",
    "final observation of another step",
    "next truth in the reward",
    "observe disagrees",
)
"""Faults that a parameter switches on, so that one program has them all."""

COUNTER = itertools.count()


class Seen(struct.PyTreeNode):
    predicted: jax.Array
    action_mask: jax.Array


@jax.custom_batching.custom_vmap
def mixed(value):
    return value


@mixed.def_vmap
def _(axis_size, in_batched, value):
    return jnp.roll(value, 1, axis=0), True


@dataclass(frozen=True)
class Toy:
    """Requests come and are answered at once, so that it compiles in no time; with one fault, or none."""

    fault: str = ""
    episode_length: int = 3
    num_actions: int = 3

    def action_space(self, params: Any = None):
        return Discrete(4 if self.fault == "other number of actions" else 3)

    def observation_space(self, params: Any = None):
        return Dict({"predicted": Box(-3.0, 3.0, (2,)), "action_mask": Box(False, True, (3,), bool)}, Seen)

    def _has(self, params: EnvParams, fault: str) -> jax.Array:
        return params.penalty_weight == TRACED.index(fault)

    def observe(self, state: EnvState, params: EnvParams) -> Seen:
        has = lambda fault: self._has(params, fault)  # noqa: E731
        predicted = state.request.predicted_score.astype(jnp.float32)
        predicted += 1e-3 * has("arriving truth observed") * state.request.output_tokens
        predicted += 1e-3 * has("queued truth observed") * state.engines.target_tokens[0]
        predicted += 10 * has("far out of its range")
        return Seen(predicted, jnp.broadcast_to(~has("no action allowed"), 3))

    def reset(self, key: jax.Array, params: EnvParams):
        if self.fault == "one value from reset":
            return self.observe(self._state(key, params), params)
        state = self._state(key, params)
        return self.observe(state, params), state

    def _state(self, key: jax.Array, params: EnvParams) -> EnvState:
        workload, _, request = params.workload.sample(key, params.workload.reset(key))
        zeros, integers = jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.int32)
        queued = QueuedRequests(zeros, integers, zeros, zeros, integers)
        engines = empty_engine(1, (2,))
        return EnvState(engines, queued, request, workload, jnp.int32(0), jnp.zeros(()), jnp.zeros(2), None)

    def step(self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams):
        fault, has = self.fault, lambda fault: self._has(params, fault)
        if fault == "python number of a parameter":
            float(params.latency_limit)
        workload, _, request = params.workload.sample(key, state.workload)
        end = (state.step + 1 >= self.episode_length) & ~has("no end")
        after = state.replace(workload=workload, request=request, step=state.step + 1)
        final = self.observe(after, params)
        # What is fresh about the next episode is another request.
        other = request.replace(predicted_score=request.predicted_score[::-1])
        fresh = after.replace(request=other, step=has("state not fresh").astype(jnp.int32))
        after = choose(end, fresh, after)
        observation, reward = self.observe(after, params), jnp.sum(state.request.score)
        observation = choose(has("no auto-reset"), final, observation)
        final = choose(has("final observation of another step"), self.observe(state, params), final)
        spoilt = jnp.where(has("NaN") & (state.step == 1), jnp.nan, jnp.where(has("observe disagrees"), 0.5, 1))
        observation, final = (seen.replace(predicted=seen.predicted * spoilt) for seen in (observation, final))
        reward = jnp.where(has("infinite reward") & (state.step == 1), jnp.inf, reward)
        reward += has("next truth in the reward") * request.score[0]
        terminated = end & (has("done for truncated") | has("both ends"))
        truncated = end & ~has("done for truncated")
        if fault == "wrong dtype":
            observation = observation.replace(predicted=observation.predicted.astype(jnp.float16))
        if fault == "shape changes":
            observation = observation.replace(predicted=observation.predicted[:1])
        if fault == "state changes its dtype":
            after = after.replace(step=after.step.astype(float))
        if fault == "whole reward":
            reward = reward.astype(jnp.int32)
        if fault == "rows mixed":
            reward = mixed(reward)
        if fault == "random numbers of the host":
            reward += np.random.default_rng().random()
        if fault == "counter of the host":
            reward += next(COUNTER)
        if fault == "callback":
            callback = lambda value: np.float32(value + next(COUNTER))  # noqa: E731
            reward = jax.pure_callback(callback, reward, reward, vmap_method="sequential")
        info = {} if fault == "no final observation" else {"final_observation": final}
        if fault == "four values":
            return observation, after, reward, info
        return observation, after, reward, terminated, truncated, info


def choose(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


class Unhashable(Toy):
    __hash__ = None  # type: ignore[assignment]


class Lossy(Toy):
    def __reduce__(self):
        return Toy, ("", 4)


@dataclass(frozen=True)
class Five(FiveValues):
    fault: str = ""

    def step(self, key, state, action, params):
        observation, state, reward, done, info = super().step(key, state, action, params)
        if self.fault == "never done":
            done = jnp.zeros_like(done)
        if self.fault == "discount at a truncation":
            info["discount"] = 1 - done.astype(float)
        if self.fault == "no truncated":
            del info["truncated"]
        return observation, state, reward, done, info


class Nothing:
    pass


FAULTS = [
    (Nothing(), "interface: there is no reset"),
    (Toy("other number of actions"), "interface: the action space has 4 actions, num_actions is 3"),
    (Toy("one value from reset"), r"interface: reset must return \(observation, state\)"),
    (Toy("four values"), r"interface: step must return \(observation, state, reward, terminated"),
    (Toy("no final observation"), r'interface: info\["final_observation"\] is missing'),
    (Five(Toy(), "no truncated"), r'interface: info\["truncated"\] is missing'),
    (Unhashable(), "copies: not hashable"),
    (Toy("python number of a parameter"), "trace: step.* cannot be traced"),
    (Toy("wrong dtype"), r"shapes: step's observation.predicted is float16\[2\]"),
    (Toy("shape changes"), r"shapes: step's observation.predicted is float32\[1\]"),
    (Toy("state changes its dtype"), r"shapes: step's state.step is float32\[\], from reset int32\[\]"),
    (Toy("whole reward"), r"shapes: reward is int32\[\]"),
    ("NaN", "observation: has a NaN or an infinity, first after decision 2"),
    ("infinite reward", "reward: is a NaN or an infinity, first after decision 2"),
    ("far out of its range", "observation: is outside of the observation space"),
    ("no action allowed", "action mask: allows no action"),
    ("done for truncated", "end: terminated at the time limit of 3 decisions, which is a truncation"),
    ("both ends", "end: a step is both terminated and truncated"),
    ("no end", "end: an episode has no end after 3 decisions"),
    (Five(Toy(), "never done"), "end: done is not"),
    (Five(Toy(), "discount at a truncation"), r'end: info\["discount"\]'),
    ("no auto-reset", "reset: .* there is no auto-reset"),
    ("state not fresh", "reset: the state after an episode's end is not a fresh episode's"),
    ("final observation of another step", "final observation: differs"),
    (Toy("random numbers of the host"), "purity: traced again"),
    (Toy("counter of the host"), "purity: traced again"),
    (Lossy(), "copies: the environment that pickle gives does not compute the same"),
    (Toy("callback"), "determinism: the same key"),
    (Toy("rows mixed"), "vmap: the reward of a step under jax.vmap"),
    ("next truth in the reward", "leak: the reward depends on the next request's true"),
    ("arriving truth observed", "leak: the observation depends on the next request's true"),
    ("queued truth observed", "leak: the observation depends on true output lengths or scores of requests"),
    ("observe disagrees", "observe: .* is not the observation that came with the state"),
]


@pytest.mark.parametrize("env", [Wrapper(Toy()), FiveValues(Toy())])
def test_sound_environments_pass(env):
    check_env(env, PARAMS)


@pytest.mark.parametrize(("env", "message"), FAULTS, ids=lambda value: getattr(value, "fault", value))
def test_each_fault_is_named(env, message):
    params = PARAMS
    if isinstance(env, str):
        env, params = Toy(), PARAMS.replace(penalty_weight=jnp.asarray(TRACED.index(env), float))
    with pytest.raises(ContractError, match=f"^{message}"):
        check_env(env, params)


def test_a_class_inside_of_a_function_cannot_be_pickled():
    class Local(Toy):
        pass

    with pytest.raises(ContractError, match="^copies: cannot be pickled"):
        check_env(Local(), PARAMS)
