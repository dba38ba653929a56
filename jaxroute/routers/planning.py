"""Routers that run the simulator forward, with predicted or with true lengths and scores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.batching import batch_first, batch_last, over_batch
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.few_slots import FEW_SLOTS, first_slots
from jaxroute.environment.impact import joining_finish, joining_gain, predicted_engine
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import actions_among, smallest
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import NEVER


def lookahead(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The action with the highest predicted gain in QoS; drops if no gain is above 0 (simulation.md section 4).

    The gain of an expert is the QoS of all of its requests if it runs until it is empty with the request, less their
    QoS without it. There are no further arrivals, and predicted lengths and scores replace the true ones. The other
    experts are not affected.
    """
    return _highest_gain(env, state, params, among, clairvoyant=False)


def clairvoyant(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """Like `lookahead`, with the true lengths and scores, to show the value of knowing them.

    It is no upper bound: a router that also knew future arrivals could do better.
    """
    return _highest_gain(env, state, params, among, clairvoyant=True)


def block(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """Block (arXiv 2508.03611): the expert with the lowest latency that a simulation predicts for the request.

    Each expert is simulated with the request, without further arrivals and with predicted lengths, its own and those
    of the requests already there. The latency is the time from arrival to the last token. Scores have no effect.
    """
    latency = _over_experts(env, state, params, _latencies)
    return smallest(latency, among)


def _over_experts(
    env: RoutingEnvironment, state: EnvState, params: EnvParams, simulate: Callable[[EnvState, EnvParams], jax.Array]
) -> jax.Array:
    """float [N]: the result of `simulate`, float [N, B] of leaves [..., B], on as few slots as are needed."""

    def batched(state: EnvState, params: EnvParams) -> jax.Array:
        """The result, float [B, N], from leaves [B, ...]."""
        state, params = batch_last((state, params))
        all_slots = lambda state: simulate(state, params)  # noqa: E731
        if env.slots <= FEW_SLOTS:
            return batch_first(all_slots(state))
        few = lambda state: all_slots(first_slots(state))  # noqa: E731
        return batch_first(jax.lax.cond(jnp.max(state.engines.num_requests) < FEW_SLOTS, few, all_slots, state))

    return over_batch(batched)(state.replace(workload=None, totals=None), params.replace(workload=None))


def _highest_gain(
    env: RoutingEnvironment, state: EnvState, params: EnvParams, among: jax.Array, clairvoyant: bool
) -> jax.Array:
    gain = _over_experts(env, state, params, partial(_gains, clairvoyant=clairvoyant))
    mask = actions_among(env, state, params, among)
    # Dropping has a gain of 0 and is first, so an expert is chosen only if its gain is above 0.
    gain = jnp.where(jnp.roll(mask, 1), jnp.append(0.0, gain), -jnp.inf)
    return (jnp.argmax(gain) - 1).astype(jnp.int32) % env.num_actions


def _latencies(state: EnvState, params: EnvParams) -> jax.Array:
    """float [N, B]: s from arrival to the last token of the request at each expert; NEVER if it cannot finish there."""
    request = state.request
    engines = predicted_engine(state.engines, state.queued.predicted_tokens, params.engines)
    length = request.predicted_output_tokens
    finish = joining_finish(engines, request.prompt_tokens, length, params.engines, request.prefix)
    return jnp.where(rules(params.engines).can_serve(request.prompt_tokens, length, params.engines), finish, NEVER)


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
        params.qos_rule,
        params.engines,
        request.prefix,
    )
    gain -= params.qos_rule.cost(length)
    return jnp.where(rules(params.engines).can_serve(request.prompt_tokens, length, params.engines), gain, 0)
