"""Planning with the simulator: every action is tried in copies of the cluster, by simple rollouts.

    python examples/planning.py            # QoS 0.693, Round-Robin 0.596; a minute of one core
    python examples/planning.py --short    # one small cluster, a few seconds

The figures are for paper-3 at its 3 requests/s, on 8 fresh episodes of 500 requests.

The environment is pure, so a planner can copy the state and step the copy. The state also contains what an honest
planner must not use: the true lengths and scores of the requests present. `believed` replaces them by the predictions.
The planner cannot see future arrivals, because the state contains no random key. Its rollouts draw arrivals from their
own keys, with the workload's rate and generator as a model.

An action's value is the QoS of a copy in which the action is taken and a simple rule decides the next requests. The
remaining requests then run to their end, because the copy's environment has episodes of that length. All actions are
evaluated on the same simulated futures, which reduces the variance of the differences between actions.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxroute


def believed(state: Any, params: Any) -> Any:
    """The state with predicted lengths and scores instead of the true ones, at the first decision of an episode."""
    request, queued = state.request, state.queued
    return state.replace(
        request=request.replace(output_tokens=request.predicted_output_tokens, score=request.predicted_score),
        engines=jaxroute.predicted_engine(state.engines, queued.predicted_tokens, params.engines),
        queued=queued.replace(score=queued.predicted_score),
        step=jnp.int32(0),
    )


def make_planner(env: Any, futures: int, horizon: int) -> Any:
    """A router that tries each action in `futures` simulated futures of `horizon` decisions."""
    model = dataclasses.replace(env, episode_length=horizon, metrics="histogram", penalty="off")
    rule = jaxroute.make_router("score_minus_load", env)

    def value(action: jax.Array, key: jax.Array, state: Any, params: Any) -> jax.Array:
        """QoS of the copy in one future, float []."""

        def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            state, action = carry
            _, state, _, _, _, info = model.step(key, state, action, params)
            return (state, rule(key, None, state, params)), info["episode"].qos.sum()

        return jax.lax.scan(step, (state, action), jax.random.split(key, horizon))[1][-1]

    def router(key: jax.Array, observation: Any, state: Any, params: Any) -> jax.Array:
        empty = model.reset(key, params)[1].totals
        copy = believed(state, params).replace(totals=empty)
        actions, keys = jnp.arange(env.num_actions), jax.random.split(key, futures)
        over_futures = jax.vmap(value, (None, 0, None, None))
        values = jax.vmap(over_futures, (0, None, None, None))(actions, keys, copy, params)
        return jnp.argmax(values.mean(axis=1)).astype(jnp.int32)

    return router


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one short episode on a small cluster")
    short = parser.parse_args(argv).short
    env, params = jaxroute.make("paper-3", **({"slots": 8, "episode_length": 10} if short else {"episode_length": 500}))
    routers = {
        "planning": make_planner(env, futures=2, horizon=3) if short else make_planner(env, futures=8, horizon=12),
        "round_robin": jaxroute.make_router("round_robin", env),
    }
    for name, values in jaxroute.evaluate_routers(env, params, routers, episodes=1 if short else 8, seed=1).items():
        print(f"{name:12} QoS {values['qos'].mean():.4f}  dropped {values['drop_rate'].mean():.1%}")


if __name__ == "__main__":
    main()
