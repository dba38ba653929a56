"""Decisions per second of the whole environment step under Shortest Queue First, as in training: requests drawn from
keys, simulator, graph observation, predicted penalty, metrics, automatic reset.

Parameters are traced. The drain at the end of an episode occurs once in --episode-length steps, so usually in no timed
call unless episodes are short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import decisions
from benchmarks.decisions import Scan, Setting
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import command

Act = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
"""(weights, observation, queue lengths int32 [B, N], key) -> action int32 [B]."""


def rollout_by(act: Act, weights: Any, setting: Setting, params: EnvParams) -> Scan:
    """The environment with actions from `act`. It uses all outputs of a step that training uses."""
    num_envs = setting.num_envs
    env = RoutingEnvironment(num_experts=setting.experts, slots=setting.slots, episode_length=setting.episode_length)
    observation, state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), num_envs), params)
    carry = (observation, jax.tree.map(jnp.copy, observation), state)

    def run(carry: Any, key: jax.Array, params: EnvParams, weights: Any) -> tuple[Any, tuple[Any, ...]]:
        def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            observation, _, state = carry
            key, act_key = jax.random.split(key)
            action = act(weights, observation, env.queue_lengths(state), act_key)
            observation, state, reward, _, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
                jax.random.split(key, num_envs), state, action, params
            )
            ended = jax.tree.map(
                lambda leaf: jnp.where(truncated.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0).sum(0), info["episode"]
            )
            return (observation, info["final_observation"], state), (info["qos"].mean(), reward.mean(), ended)

        carry, (qos, reward, ended) = jax.lax.scan(step, carry, jax.random.split(key, setting.steps_per_call))
        return carry, (qos.mean(), reward.mean(), jax.tree.map(lambda leaf: leaf.sum(0), ended))

    return Scan(run, carry, (params, weights), state)


def shortest_queue(weights: Any, observation: Any, lengths: jax.Array, key: jax.Array) -> jax.Array:
    del weights, observation, key
    return jnp.argmin(lengths, axis=-1)


def rollout(setting: Setting, params: EnvParams) -> Scan:
    return rollout_by(shortest_queue, (), setting, params)


@command
def main(argv: Sequence[str] | None = None) -> int:
    return decisions.main("environment", __doc__, rollout, argv)


if __name__ == "__main__":
    sys.exit(main())
