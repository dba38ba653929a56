"""Routers that run the simulator itself forward: on predictions, and on the truth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.batching import batch_first, batch_last, over_batch
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.impact import joining_gain, predicted_engine
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.environment.step import FEW_SLOTS
from jaxroute.routers.choice import Router
from jaxroute.simulator.disciplines import rules


def lookahead(env: RoutingEnvironment) -> Router:
    """The action with the highest predicted gain in QoS; drops where none is above 0 (simulation.md section 4).

    The gain of an expert: QoS of all of its requests when it runs to its end with the request, less that without,
    with no further arrivals, and with predicted lengths and scores for the true ones. All other experts go on alike.
    """
    return _planner(env, clairvoyant=False)


def clairvoyant(env: RoutingEnvironment) -> Router:
    """As `lookahead`, with the true lengths and scores: what a router could reach that knew them.

    No bound: who knew future arrivals as well could do better.
    """
    return _planner(env, clairvoyant=True)


def _planner(env: RoutingEnvironment, clairvoyant: bool) -> Router:
    def batched(params: EnvParams, state: EnvState) -> jax.Array:
        """float [B, N], of leaves [B, ...]."""
        params, state = batch_last((params, state))
        gains = lambda state: _gains(params, state, clairvoyant)  # noqa: E731
        if env.slots <= FEW_SLOTS:
            return batch_first(gains(state))
        few = lambda state: gains(jax.tree.map(lambda leaf: leaf[:FEW_SLOTS] if leaf.ndim == 3 else leaf, state))  # noqa: E731
        return batch_first(jax.lax.cond(jnp.max(state.engines.num_requests) < FEW_SLOTS, few, gains, state))

    def router(observation: Any, state: EnvState, params: EnvParams, key: jax.Array) -> jax.Array:
        gain = over_batch(batched)(params.replace(workload=None), state.replace(workload=None, totals=None))
        mask = action_mask(params, state, env.slots, env.drop)
        # To drop gains 0, and stands first: it is what an expert has to beat.
        gain = jnp.where(jnp.roll(mask, 1), jnp.append(0.0, gain), -jnp.inf)
        return (jnp.argmax(gain) - 1).astype(jnp.int32) % env.num_actions

    return router


def _gains(params: EnvParams, state: EnvState, clairvoyant: bool) -> jax.Array:
    """float [N, B]: the gain in QoS of sending the request to each expert; 0 where it could never finish."""
    engines, slots, request = state.engines, state.slots, state.request
    score, own_score, length = slots.score, request.score, request.output_tokens
    if not clairvoyant:
        engines = predicted_engine(params.engines, engines, slots.predicted_tokens)
        score, own_score, length = slots.predicted_score, request.predicted_score, request.predicted_output_tokens
    gain = joining_gain(
        params.engines, params.latency_limit, engines, -slots.arrival, score, request.prompt_tokens, length, own_score
    )
    return jnp.where(rules(params.engines).can_serve(params.engines, request.prompt_tokens, length), gain, 0)
