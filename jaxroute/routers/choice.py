"""Common parts of routers: their type, the experts to choose among, and the choice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.batching import in_own_modes
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.impact import expected_length
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.environment.step import prefix_share
from jaxroute.simulator.disciplines import rules, used_blocks
from jaxroute.simulator.latency import iteration_time, prefill_time

Router = Callable[[jax.Array, Any, EnvState, EnvParams], jax.Array]
"""(key, observation, state, params) -> action int32 []. Any such function is a router."""


class RuleRouter(struct.PyTreeNode):
    """A rule for an environment. Routers with one rule and equal environments are equal and share compiled programs."""

    # (env, key, observation, state, params, among, **own) -> action; `among`, bool [N], are the experts to choose among
    rule: Callable[..., jax.Array] = struct.field(pytree_node=False)
    env: RoutingEnvironment = struct.field(pytree_node=False)
    parameters: dict[str, Any]  # parameters of the rule, and `admission`, by name, traced
    # its key is that of the environment in the episode, from which the requests to come can be sampled
    knows_future: bool = struct.field(pytree_node=False, default=False)
    sees_all: bool = struct.field(pytree_node=False, default=False)  # the engines as they are, whatever a router sees

    @in_own_modes
    def __call__(self, key: jax.Array, observation: Any, state: EnvState, params: EnvParams) -> jax.Array:
        """The action, int32 [].

        The rule chooses among the experts that the action mask allows, or among all if it allows none. A parameter
        `admission` leaves out those whose `predicted_latency` is not below `admission` * the latency limit, and the
        request is dropped if none is left. It has no effect where requests may not be dropped (`env.drop`).
        """
        if not self.sees_all:
            state = state.visible()
        own, among = dict(self.parameters), candidates(self.env, state, params)
        admission = own.pop("admission", None)
        if admission is None or not self.env.drop:
            return self.rule(self.env, key, observation, state, params, among, **own)
        admitted = among & (predicted_latency(state, params) < admission * own_limit(state, params))
        action = self.rule(self.env, key, observation, state, params, admitted, **own)
        return jnp.where(admitted.any(), action, self.env.num_experts).astype(jnp.int32)

    def __hash__(self) -> int:
        # `jax.jit(router)` hashes it. The numbers are left out, as arrays have no hash.
        return hash((self.rule, self.env, *self.parameters))


def candidates(env: RoutingEnvironment, state: EnvState, params: EnvParams) -> jax.Array:
    """bool [N]: the experts that the action mask allows, or all experts if it allows none."""
    allowed = action_mask(state, params, env.slots)[:-1]
    return allowed | ~allowed.any()


def own_limit(state: EnvState, params: EnvParams) -> jax.Array:
    """float [N]: s per output token that the arriving request may take at each expert, by its predicted length."""
    return params.qos_rule.per_token(state.request.predicted_output_tokens)


def actions_among(env: RoutingEnvironment, state: EnvState, params: EnvParams, among: jax.Array) -> jax.Array:
    """bool [N + 1]: the action mask, without the experts that are not in `among` (bool [N])."""
    mask = action_mask(state, params, env.slots, env.drop)
    return jnp.append(mask[:-1] & among, mask[-1])


def turns_away(env: RoutingEnvironment, state: EnvState) -> jax.Array:
    """int32 [N]: decisions until it is each expert's turn; the turn goes to the next expert at each decision."""
    return (jnp.arange(env.num_experts) - state.step) % env.num_experts


def kv_use(state: EnvState, params: EnvParams) -> jax.Array:
    """float [N]: share of each expert's KV blocks that its running requests hold."""
    return used_blocks(state.engines, params.engines) / params.engines.usable_blocks


def waiting_requests(state: EnvState) -> jax.Array:
    """int32 [N]: requests that wait at each expert."""
    return state.engines.num_requests - state.engines.num_running


def held_share(env: RoutingEnvironment, state: EnvState, params: EnvParams) -> jax.Array:
    """float [N]: the share of the arriving prompt that each expert is expected to hold, or holds (`prefix_share`)."""
    if env.prefix_share == "off":
        return jnp.zeros(env.num_experts, float)
    return prefix_share(env, state, params)


def predicted_latency(state: EnvState, params: EnvParams) -> jax.Array:
    """float [N]: predicted seconds per output token of the arriving request at each expert, from its arrival on.

    At its expert the request waits for the iteration under way, then for the prefill of the waiting requests and its
    own, and then takes one iteration per predicted output token. All requests of the expert decode in these iterations,
    with their present contexts. If seats or KV blocks do not suffice for all of them, each request too many waits for
    one that ends: the mean remaining length of the running requests, in iterations, divided by their number. Lengths
    are predicted; no request arrives later.
    """
    engine, engines, own = state.engines, params.engines, state.request
    there = engine.unfinished()
    running = there & (engine.position < engine.num_running)
    length = own.predicted_output_tokens
    held = jnp.where(running, engine.computed, engine.prompt_tokens + engine.generated)
    context = jnp.where(there, held, 0).sum(0) + own.prompt_tokens
    decodes = jnp.minimum(there.sum(0) + 1, engines.max_num_seqs)
    iteration = iteration_time(engines.latency, jnp.int32(0), decodes, context + decodes)
    to_prefill = jnp.where(there & ~running, held, 0).sum(0) + own.prompt_tokens
    blocks = rules(engines).held_blocks(held, engines)
    needed = jnp.where(there, blocks, 0).sum(0) + rules(engines).held_blocks(own.prompt_tokens, engines)
    mean_blocks = needed / (there.sum(0) + 1)
    too_many = jnp.maximum(
        there.sum(0) + 1 - engines.max_num_seqs, (needed - rules(engines).admissible_blocks(engines)) / mean_blocks
    )
    remaining = expected_length(state.queued.predicted_tokens, engine.generated) - engine.generated
    turnover = jnp.where(running, remaining, 0).sum(0) / jnp.maximum(running.sum(0), 1) ** 2
    iterations = length + jnp.maximum(too_many, 0) * turnover
    prefill = prefill_time(engines.latency, to_prefill)
    return (jnp.maximum(engine.clock, 0) + prefill + iteration * iterations) / length


def smallest(cost: jax.Array, among: jax.Array) -> jax.Array:
    """int32 []: the expert with the smallest `cost` [N] in `among` (bool [N]); ties go to the lowest index."""
    return jnp.argmin(jnp.where(among, cost.astype(float), jnp.inf)).astype(jnp.int32)


def cheapest(cost: jax.Array, among: jax.Array) -> jax.Array:
    """bool [N]: all experts with the smallest `cost` [N] in `among` (bool [N])."""
    cost = jnp.where(among, cost.astype(float), jnp.inf)
    return among & (cost == cost.min())


def smallest_at_random(cost: jax.Array, among: jax.Array, key: jax.Array) -> jax.Array:
    """Like `smallest`, but ties are broken uniformly at random."""
    return smallest(jax.random.uniform(key, cost.shape), cheapest(cost, among))
