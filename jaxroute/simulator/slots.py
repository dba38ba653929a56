"""Slots of a queue: a request joins at the end; finished ones are taken out without changing the order of the rest."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import NEVER, EngineState

Tree = TypeVar("Tree")


def append(
    state: EngineState, joins: jax.Array, prompt_tokens: jax.Array, target_tokens: jax.Array, at: jax.Array
) -> EngineState:
    """Puts a request at the tail of `waiting`, at time `at` (s), if `joins` (bool []). The caller has seen a free slot.

    An idle engine starts at the arrival; a busy one goes on with its own clock.
    """
    here = joins & (jnp.arange(state.num_slots, dtype=jnp.int32) == state.num_requests)
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


def first_finished(state: EngineState) -> jax.Array:
    """int32 []: the first slot whose request has finished, S where there is none."""
    position = jnp.arange(state.num_slots, dtype=jnp.int32)
    finished = (position < state.num_requests) & (state.finish_time < NEVER)
    return jnp.min(jnp.where(finished, position, state.num_slots))


def remove(state: EngineState, carried: Tree, at: jax.Array) -> tuple[EngineState, Tree]:
    """Takes out the request in slot `at` (int32 []; S: none); `carried` are further arrays [S] that move along.

    By a shift of what is behind it: few requests finish at one engine between two arrivals, and on CPUs a few shifts
    are an order of magnitude cheaper than a gather by sorted or counted positions.
    """
    behind = jnp.arange(state.num_slots, dtype=jnp.int32) >= at

    def shift(leaf: jax.Array) -> jax.Array:
        return jnp.where(behind, jnp.append(leaf[1:], leaf[-1:]), leaf) if leaf.ndim else leaf

    shifted, carried = jax.tree.map(shift, (state, carried))
    shifted = shifted.replace(
        num_requests=state.num_requests - (at < state.num_requests),
        num_running=state.num_running - (at < state.num_running),
    )
    return shifted, carried
