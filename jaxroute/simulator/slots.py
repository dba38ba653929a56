"""Slots of a queue: a request joins at the end; finished ones are taken out without changing the order of the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import NEVER, EngineState, Tree, prefix_sum, total


def append(
    state: EngineState, joins: jax.Array, prompt_tokens: jax.Array, target_tokens: jax.Array, at: jax.Array
) -> EngineState:
    """Puts a request at the tail of `waiting`, at time `at` (s), where `joins` (bool [...]); all of them [...].

    The caller has seen a free slot. An idle engine starts at the arrival; a busy one goes on with its own clock.
    """
    here = joins & (state.position == state.num_requests)
    return state.replace(
        num_requests=state.num_requests + joins,
        clock=jnp.where(joins, jnp.maximum(state.clock, at), state.clock),
        prompt_tokens=jnp.where(here, prompt_tokens, state.prompt_tokens),
        target_tokens=jnp.where(here, target_tokens, state.target_tokens),
        generated=jnp.where(here, 0, state.generated),
        computed=jnp.where(here, 0, state.computed),
        preemptions=jnp.where(here, 0, state.preemptions),
        first_token_time=jnp.where(here, NEVER, state.first_token_time),
        finish_time=jnp.where(here, NEVER, state.finish_time),
    )


_AT_ONCE = 3
"""Requests of one engine that a round of `remove` takes out; more than one rarely finish between two arrivals."""


def remove(state: EngineState, carried: Tree, done: jax.Array) -> tuple[EngineState, Tree]:
    """Takes out the requests in the slots `done` (bool [S, ...]); `carried`, more arrays [S, ...], move along.

    A slot is filled from the next one that stays, which is at most a few further on: selects among shifted copies, on
    CPUs an order of magnitude cheaper than a gather by sorted or counted positions.
    """

    def shifted(leaf: jax.Array, by: int) -> jax.Array:
        return jnp.concatenate([leaf[by:], leaf[:by]])

    def close_gaps(carry: tuple[EngineState, Tree, jax.Array]) -> tuple[EngineState, Tree, jax.Array]:
        state, carried, done = carry
        gaps = prefix_sum(done)
        leaves_now = done & (gaps <= _AT_ONCE)
        gaps = jnp.minimum(gaps, _AT_ONCE)
        # A slot i < by that `shifted` wraps around to the end has at most i + 1 <= by gaps up to it, and `by` of them
        # only if it is a gap itself: so it is never taken for a slot that moves up.
        comes = [(shifted(gaps, by) == by) & ~shifted(leaves_now, by) for by in range(_AT_ONCE)]

        def fill(leaf: jax.Array) -> jax.Array:
            if leaf.ndim < done.ndim:
                return leaf
            filled = shifted(leaf, _AT_ONCE)
            for by in reversed(range(_AT_ONCE)):
                filled = jnp.where(comes[by], shifted(leaf, by), filled)
            return filled

        num_running = state.num_running - total(leaves_now & (state.position < state.num_running))
        filled, carried = jax.tree.map(fill, (state, carried))
        filled = filled.replace(num_requests=state.num_requests - total(leaves_now), num_running=num_running)
        # Past the end a gap may be copied along.
        return filled, carried, fill(done & ~leaves_now) & (state.position < filled.num_requests)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), close_gaps, (state, carried, done))[:2]
