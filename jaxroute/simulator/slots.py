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


def remove_finished(state: EngineState, carried: Tree) -> tuple[EngineState, Tree]:
    """Closes the holes that finished requests leave; `carried` are further arrays [S] that move along with the slots."""
    slots = state.num_slots
    position = jnp.arange(slots, dtype=jnp.int32)
    kept = state.unfinished()
    rank = jnp.cumsum(kept, dtype=jnp.int32)
    # The slot that lands at position i is the one behind all slots of rank <= i: counted, which beats a sort.
    source = jnp.sum(rank[None, :] <= position[:, None], axis=1, dtype=jnp.int32)
    arrays = (
        state.prompt_tokens,
        state.target_tokens,
        state.generated,
        state.computed,
        state.preemptions,
        state.first_token_time,
        carried,
    )
    moved = jax.tree.map(lambda leaf: jnp.take(leaf, source, mode="clip"), arrays)
    state = state.replace(
        num_requests=rank[-1],
        num_running=jnp.sum(kept & (position < state.num_running), dtype=jnp.int32),
        prompt_tokens=moved[0],
        target_tokens=moved[1],
        generated=moved[2],
        computed=moved[3],
        preemptions=moved[4],
        first_token_time=moved[5],
        finish_time=jnp.full_like(state.finish_time, NEVER),
    )
    return state, moved[6]
