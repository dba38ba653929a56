"""Routers that run the simulator forward, with predicted or with true lengths and scores."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.batching import batch_first, batch_last, over_batch
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.few_slots import FEW_SLOTS, first_slots
from jaxroute.environment.impact import joining_gain, predicted_engine
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.disciplines import rules


def lookahead(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """The action with the highest predicted gain in QoS; drops if no gain is above 0 (simulation.md section 4).

    The gain of an expert is the QoS of all of its requests if it runs until it is empty with the request, less their
    QoS without it. There are no further arrivals, and predicted lengths and scores replace the true ones. The other
    experts are not affected.
    """
    return _highest_gain(env, state, params, clairvoyant=False)


def clairvoyant(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """Like `lookahead`, with the true lengths and scores, to show the value of knowing them.

    It is no upper bound: a router that also knew future arrivals could do better.
    """
    return _highest_gain(env, state, params, clairvoyant=True)


def _highest_gain(env: RoutingEnvironment, state: EnvState, params: EnvParams, clairvoyant: bool) -> jax.Array:
    def batched(state: EnvState, params: EnvParams) -> jax.Array:
        """The gains, float [B, N], from leaves [B, ...]."""
        state, params = batch_last((state, params))
        gains = lambda state: _gains(state, params, clairvoyant)  # noqa: E731
        if env.slots <= FEW_SLOTS:
            return batch_first(gains(state))
        few = lambda state: gains(first_slots(state))  # noqa: E731
        return batch_first(jax.lax.cond(jnp.max(state.engines.num_requests) < FEW_SLOTS, few, gains, state))

    gain = over_batch(batched)(state.replace(workload=None, totals=None), params.replace(workload=None))
    mask = action_mask(state, params, env.slots, env.drop)
    # Dropping has a gain of 0 and is first, so an expert is chosen only if its gain is above 0.
    gain = jnp.where(jnp.roll(mask, 1), jnp.append(0.0, gain), -jnp.inf)
    return (jnp.argmax(gain) - 1).astype(jnp.int32) % env.num_actions


def _gains(state: EnvState, params: EnvParams, clairvoyant: bool) -> jax.Array:
    """float [N, B]: the gain in QoS of sending the request to each expert; 0 if it could never finish there."""
    engines, queued, request = state.engines, state.queued, state.request
    score, own_score, length = queued.score, request.score, request.output_tokens
    if not clairvoyant:
        engines = predicted_engine(engines, queued.predicted_tokens, params.engines)
        score, own_score, length = queued.predicted_score, request.predicted_score, request.predicted_output_tokens
    gain = joining_gain(
        engines,
        -queued.arrival,
        score,
        request.prompt_tokens,
        length,
        own_score,
        params.latency_limit,
        params.engines,
    )
    return jnp.where(rules(params.engines).can_serve(request.prompt_tokens, length, params.engines), gain, 0)
