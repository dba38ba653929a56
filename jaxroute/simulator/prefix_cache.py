"""The prefix cache of requests that share nothing (simulation.md section 1c): which of its own blocks each one finds.

Such a request finds blocks only after it was preempted. `engine.OwnBlocks` says where they are in vLLM's free queue:
next to each other, the last one in front, so that what remains of them is a leading part of the request's tokens.
Released blocks enter the queue behind them, except those without content, which enter in front since vLLM 0.23 (rule
B8).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import (
    EngineParams,
    EngineState,
    OwnBlocks,
    anywhere,
    blocks_for,
    full_blocks,
    lowest,
    prefix_sum,
    total,
)


def where_found(
    cache: OwnBlocks, update: Callable[[OwnBlocks], OwnBlocks], also: jax.Array | bool = False
) -> OwnBlocks:
    """`update(cache)` if a request of any engine has cached blocks, or `also` (bool [...]) is True for any.

    Without memory pressure nobody is preempted, nobody has any, and the cache stays as it is.
    """
    return jax.lax.cond(anywhere((cache.found > 0) | also), update, lambda cache: cache, cache)


_Preempting = tuple[jax.Array, jax.Array, jax.Array, OwnBlocks]
"""The requests to preempt, the blocks still to allocate to each request, the free blocks, and the cache."""


def allocate(cache: OwnBlocks, blocks: jax.Array) -> OwnBlocks:
    """The cache after this number of `blocks` (int32 [...]) was taken from the front of the free queue (rule B6)."""
    evicted = jnp.maximum(blocks - cache.ahead, 0)
    return OwnBlocks(found=jnp.maximum(cache.found - evicted, 0), ahead=jnp.maximum(cache.ahead - blocks, 0))


def held_blocks(state: EngineState, params: EngineParams) -> jax.Array:
    """int32 [S, ...]: KV blocks of the running requests."""
    running = state.unfinished() & (state.position < state.num_running)
    return jnp.where(running, blocks_for(state.computed, params.block_size), 0)


def after_schedule(
    state: EngineState, preempted: jax.Array, found: jax.Array, ahead: jax.Array, need: jax.Array, params: EngineParams
) -> OwnBlocks:
    """The cache after an iteration was scheduled, which preempts (bool [S, ...]) or admits requests, or neither.

    `found` are the blocks that the admitted ones found, `ahead` is that of the cache without these, and `need` are the
    blocks that the scheduled requests are allocated; int32 [S, ...].
    """
    cache = state.cache
    assert isinstance(cache, OwnBlocks)
    cache = OwnBlocks(found=jnp.where(found + need > 0, 0, cache.found), ahead=ahead)
    held = held_blocks(state, params)
    free = params.usable_blocks - total(held)
    known = state.computed if state.flight is None else state.computed - state.flight.unhashed  # rule C6

    def preempt(carry: _Preempting) -> _Preempting:
        """The requests for which blocks suffice get them; then the last of `running` is preempted (rule 3)."""
        preempted, need, free, cache = carry
        served = (total(preempted) > 0) & (prefix_sum(need) <= free)
        taken = total(jnp.where(served, need, 0))
        cache, free = allocate(cache, taken), free - taken
        victim = preempted & (state.position == -lowest(jnp.where(preempted, -state.position, 1)))
        full = full_blocks(known, params.block_size)
        without_content = total(jnp.where(victim, held - full, 0))
        in_front = without_content if params.unhashed_first else 0
        cache = OwnBlocks(
            found=jnp.where(victim, full, cache.found),
            ahead=jnp.where(victim, free + without_content, cache.ahead + in_front),
        )
        return preempted & ~victim, jnp.where(served, 0, need), free + total(jnp.where(victim, held, 0)), cache

    start = (preempted, need, free, cache)
    _, need, _, cache = jax.lax.while_loop(lambda carry: anywhere(total(carry[0]) > 0), preempt, start)
    return allocate(cache, total(need))


def after_finish(state: EngineState, cache: OwnBlocks, finished: jax.Array, params: EngineParams) -> OwnBlocks:
    """The cache after the requests `finished` (bool [S, ...]) released their blocks; the final token has none."""
    if not params.unhashed_first:
        return cache
    hashed = state.prompt_tokens + state.generated - 1
    return where_found(cache, lambda cache: _after_release(state, cache, finished, hashed, params))


def after_abort(state: EngineState, cache: OwnBlocks, aborted: jax.Array, params: EngineParams) -> OwnBlocks:
    """The cache after the running requests `aborted` (bool [S, ...]) released their blocks before their end."""
    if not params.unhashed_first:
        return cache
    known = state.computed if state.flight is None else state.computed - state.flight.unhashed  # rule C6
    return _after_release(state, cache, aborted, known, params)


def _after_release(
    state: EngineState, cache: OwnBlocks, released: jax.Array, hashed_tokens: jax.Array, params: EngineParams
) -> OwnBlocks:
    full = full_blocks(hashed_tokens, params.block_size)
    without_content = total(jnp.where(released, blocks_for(state.computed, params.block_size) - full, 0))
    return cache.replace(ahead=cache.ahead + without_content)
