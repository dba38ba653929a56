"""The prefix cache of requests that share nothing (simulation.md section 1c): which of its own blocks each one finds.

Such a request finds blocks only after it was preempted. vLLM's free queue is then described by three kinds of numbers
(`engine.OwnBlocks`): the blocks in it with content, and for each preempted request its own blocks among them and those
that are allocated before them. Blocks without content are in front, since a released block without content is put there
(rule B8). A request's blocks are next to each other, the last one first, so what remains of them is a leading part of
its tokens.
"""

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


_Preempting = tuple[jax.Array, jax.Array, jax.Array, OwnBlocks]
"""The requests to preempt, the blocks still to allocate to each request, the free blocks, and the cache."""


def allocate(cache: OwnBlocks, blocks: jax.Array, free: jax.Array) -> OwnBlocks:
    """The cache after `blocks` (int32 [...]) were taken from the front of a queue of `free` blocks (rule B6)."""
    evicted = jnp.maximum(blocks - (free - cache.cached_free), 0)
    own = jnp.maximum(evicted - cache.ahead, 0)
    return OwnBlocks(
        cached_free=cache.cached_free - evicted,
        found=jnp.maximum(cache.found - own, 0),
        ahead=jnp.maximum(cache.ahead - evicted, 0),
    )


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
    assert cache is not None
    held = held_blocks(state, params)
    cache = cache.replace(
        cached_free=cache.cached_free - total(found),
        found=jnp.where(found + need > 0, 0, cache.found),
        ahead=ahead,
    )
    free = params.usable_blocks - total(held) - total(found)

    def left(preempted: jax.Array) -> jax.Array:
        return total(preempted) > 0

    def preempt(carry: _Preempting) -> _Preempting:
        """The requests for which blocks suffice get them; then the last of `running` is preempted (rule 3)."""
        preempted, need, free, cache = carry
        served = left(preempted) & (prefix_sum(need) <= free)
        blocks = total(jnp.where(served, need, 0))
        cache, free = allocate(cache, blocks, free), free - blocks
        victim = preempted & (state.position == -lowest(jnp.where(preempted, -state.position, 1)))
        full = full_blocks(state.computed, params.block_size)
        cache = OwnBlocks(
            cached_free=cache.cached_free + total(jnp.where(victim, full, 0)),
            found=jnp.where(victim, full, cache.found),
            ahead=jnp.where(victim, cache.cached_free, cache.ahead),
        )
        return preempted & ~victim, jnp.where(served, 0, need), free + total(jnp.where(victim, held, 0)), cache

    start = (preempted, need, free, cache)
    _, need, free, cache = jax.lax.while_loop(lambda carry: anywhere(left(carry[0])), preempt, start)
    return allocate(cache, total(need), free)


def after_finish(state: EngineState, cache: OwnBlocks, finished: jax.Array, params: EngineParams) -> OwnBlocks:
    """The cache after the requests `finished` (bool [S, ...]) released their blocks; the final token has none."""
    full = full_blocks(state.prompt_tokens + state.generated - 1, params.block_size)
    return cache.replace(cached_free=cache.cached_free + total(jnp.where(finished, full, 0)))
