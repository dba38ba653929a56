"""Slots of a queue: a request joins at the end, finished ones are taken out without changing the order of the rest."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import NEVER, EngineState

Tree = TypeVar("Tree")


def append(
    state: EngineState, joins: jax.Array, prompt_tokens: jax.Array, target_tokens: jax.Array, at: jax.Array
) -> EngineState:
    """Puts a request at the tail of `waiting`, at time `at` (s), if `joins` (bool []). The caller sees that a slot is free.

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
