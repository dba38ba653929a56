"""The scheduling decision of one iteration under `orca`: iteration-level scheduling with reserved memory.

As in Orca (OSDI 2022), a request is admitted with the KV blocks of the longest possible sequence, keeps them until it
ends, and is never preempted. All reservations are equal, so an engine has a fixed number of places (simulation.md
section 1b).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import EngineParams, EngineState, blocks_for, prefix_sum, total
from jaxroute.simulator.scheduler import SchedulerOutput


def reserved_blocks(params: EngineParams) -> jax.Array:
    """int32 [...]: KV blocks of a running request, whatever its length."""
    return blocks_for(params.max_model_len, params.block_size)


def held_blocks(tokens: jax.Array, params: EngineParams) -> jax.Array:
    """int32, KV blocks that a request with `tokens` in the cache holds; 0 before it runs."""
    return jnp.where(tokens > 0, reserved_blocks(params), 0)


def can_serve(prompt_tokens: jax.Array, output_tokens: jax.Array, params: EngineParams) -> jax.Array:
    """bool [...]: the cache has room for one reservation, and the prompt leaves room for a token."""
    del output_tokens
    return (prompt_tokens < params.max_model_len) & (reserved_blocks(params) <= params.usable_blocks)


def schedule(state: EngineState, params: EngineParams) -> SchedulerOutput:
    """The decision for the next iteration: running requests decode, and requests that find a place are prefilled."""
    position, unfinished = state.position, state.unfinished()
    rank = prefix_sum(unfinished)
    has_place = (rank <= params.max_num_seqs) & (rank * reserved_blocks(params) <= params.usable_blocks)
    # A running request always has a place, since the requests before it only decrease.
    scheduled = unfinished & has_place
    tokens = jnp.where(scheduled, state.prompt_tokens + state.generated - state.computed, 0)
    decodes = total(scheduled & (position < state.num_running))
    return SchedulerOutput(
        num_running=state.num_requests - total(unfinished & ~has_place),
        tokens=tokens,
        preempted=jnp.zeros_like(unfinished),
        prefill_tokens=total(tokens) - decodes,
        decodes=decodes,
        context_tokens=total(jnp.where(scheduled, state.computed + tokens, 0)),
        used_blocks=total(scheduled) * reserved_blocks(params),
    )


def only_decodes(
    state: EngineState,
    running: jax.Array,
    batch: jax.Array,
    blocks_after: Callable[[jax.Array | int], jax.Array],
    params: EngineParams,
) -> jax.Array:
    """bool [...]: the next iterations only decode `running` and admit nobody."""
    del running, blocks_after
    full = (batch >= params.max_num_seqs) | ((batch + 1) * reserved_blocks(params) > params.usable_blocks)
    return (batch > 0) & ((state.num_running == state.num_requests) | full)
