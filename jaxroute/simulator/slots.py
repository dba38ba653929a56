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
    """Closes the holes that finished requests leave; `carried` are further arrays [S] that move along with the slots.

    One hole a round, by shifting what is behind it: few requests finish at one engine between two arrivals, and on CPUs
    a shift is an order of magnitude cheaper than a gather by sorted or counted indices.
    """
    position = jnp.arange(state.num_slots, dtype=jnp.int32)

    def hole(engine: EngineState) -> jax.Array:
        """int32 []: the first slot in use whose request has finished; S where there is none."""
        finished = (position < engine.num_requests) & (engine.finish_time < NEVER)
        return jnp.min(jnp.where(finished, position, state.num_slots))

    def close(carry: tuple[jax.Array, EngineState, Tree]) -> tuple[jax.Array, EngineState, Tree]:
        first, engine, others = carry

        def shift(leaf: jax.Array) -> jax.Array:
            return jnp.where(position >= first, jnp.append(leaf[1:], leaf[-1:]), leaf) if leaf.ndim else leaf

        engine, others = jax.tree.map(shift, (engine, others))
        engine = engine.replace(
            num_requests=engine.num_requests - 1, num_running=engine.num_running - (first < engine.num_running)
        )
        return hole(engine), engine, others

    _, state, carried = jax.lax.while_loop(
        lambda carry: carry[0] < state.num_slots, close, (hole(state), state, carried)
    )
    return state, carried
