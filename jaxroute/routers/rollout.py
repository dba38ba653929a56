"""Routers that simulate what follows from each action: further arrivals included, with another router deciding then."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.impact import predicted_engine
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import Router, actions_among
from jaxroute.simulator.engine import LARGE
from jaxroute.workload.request import Request

FUTURES = 16
"""Sampled futures over which `rollout` averages."""

HORIZON = 40
"""Arrivals that are simulated: about as many as there are requests at the experts of `paper-3` when it is busy."""


def rollout(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    policy: Router,
    horizon: float | jax.Array = HORIZON,
) -> jax.Array:
    """The action with the highest mean QoS in simulated futures, over all requests there and `horizon` more arrivals.

    `policy` decides for these arrivals (a rollout algorithm, Bertsekas et al. 1997), and at last the engines run until
    they are empty. Each of `FUTURES` futures is the same for all actions, since most of what happens in one does not
    depend on the action. An action other than that of `policy` is taken only if its lead in the mean exceeds its
    standard error.

    The router knows the parameters of the environment, and samples arrivals and requests from its workload, from a
    recorded trace where an episode may begin. In each future the requests that have arrived have their predicted
    lengths and scores with the errors of other requests of the workload. The speeds of experts stay as they are.
    """
    now = params.at(state.step).replace(disturbances=None)
    own = policy(key, observation, state, params)

    def of_future(key: jax.Array) -> jax.Array:
        key_start, key_errors, key_future = jax.random.split(key, 3)
        start = _guessed(state, now, key_errors).replace(workload=params.workload.reset(key_start))
        return action_returns(env, policy, key_future, start, now, horizon)

    values = jax.vmap(of_future)(jax.random.split(key, FUTURES))
    lead = values - values[:, own, None]
    error = lead.std(0, ddof=1) / FUTURES**0.5
    clear = (lead.mean(0) > error).at[own].set(True)  # the lead of `own` over itself is 0
    return _best(env, jnp.where(clear, lead.mean(0), -jnp.inf), state, params, among)


def _guessed(state: EnvState, params: EnvParams, key: jax.Array) -> EnvState:
    """`state` with lengths and scores that its requests may have: predictions, with errors of sampled requests."""
    workload, queued, request = params.workload, state.queued, state.request
    rows = state.engines.num_slots + 1  # a request for each slot, and one for the arriving request

    def one(key: jax.Array) -> Request:
        key_start, key_request = jax.random.split(key)
        return workload.sample(key_request, workload.reset(key_start))[2]

    other = jax.vmap(one)(jax.random.split(key, rows))
    factor = other.output_tokens / other.predicted_output_tokens
    shift = other.score - other.predicted_score
    tokens = jnp.maximum(jnp.round(queued.predicted_tokens * factor[1:]), 1).astype(jnp.int32)
    own_tokens = jnp.maximum(jnp.round(request.predicted_output_tokens * factor[0]), 1).astype(jnp.int32)
    return state.replace(
        engines=predicted_engine(state.engines, tokens, params.engines),
        queued=queued.replace(score=queued.predicted_score + shift[1:]),
        request=request.replace(output_tokens=own_tokens, score=request.predicted_score + shift[0]),
    )


def rollout_clairvoyant(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    policy: Router,
    horizon: float | jax.Array = HORIZON,
) -> jax.Array:
    """Like `rollout` with the one future that will happen, as no real router could know it: true arrivals, true lengths
    and scores, speeds as they will be. `key` is that of the environment in the episode (`follow_episodes`).
    """
    return _best(env, action_returns(env, policy, key, state, params, horizon), state, params, among)


def action_returns(
    env: RoutingEnvironment,
    policy: Router,
    key: jax.Array,
    state: EnvState,
    params: EnvParams,
    horizon: float | jax.Array,
    actions: jax.Array | None = None,
) -> jax.Array:
    """float [A]: summed QoS of the requests of `state` and of `horizon` arrivals after each of `actions` (int32 [A]).

    None is all N + 1 actions.

    The arrival of decision d has the key `fold_in(key, d)`, as in `follow_episodes`, so all actions have the same
    arrivals. `policy` decides on them; those behind the end of the episode are dropped.
    """
    env_plan = replace(env, metrics="off", penalty="off", episode_length=LARGE)
    params = params.replace(credit_discount=None)

    def after(action: jax.Array) -> jax.Array:
        def move(index: jax.Array, carry: tuple[Any, EnvState, jax.Array]) -> tuple[Any, EnvState, jax.Array]:
            observation, before, qos = carry
            own = jax.random.fold_in(key, before.step)
            chosen = policy(jax.random.fold_in(own, env.num_experts), observation, before, params)
            chosen = jnp.where(before.step < env.episode_length, chosen, env.num_experts)
            chosen = jnp.where(index == 0, action, chosen)
            observation, following, *_, info = env_plan.step(own, before, chosen, params)
            return observation, following, qos + info["qos"]

        start = state.replace(totals=None)
        carry = env_plan.observe(start, params), start, jnp.zeros((), float)
        _, last, qos = jax.lax.fori_loop(0, jnp.int32(horizon) + 1, move, carry)
        return qos + env_plan.drain(last, params)

    return jax.vmap(after)(jnp.arange(env.num_actions) if actions is None else actions)


def _best(
    env: RoutingEnvironment, values: jax.Array, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    return jnp.argmax(jnp.where(actions_among(env, state, params, among), values, -jnp.inf)).astype(jnp.int32)
