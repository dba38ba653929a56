"""The two loops of vLLM's V1 scheduler for requests that share prefixes: part of `scheduler.schedule`.

How many blocks a set of requests holds is not the sum of what each one holds, and what a request finds depends on all
requests before it. So victims are preempted, and waiting requests are admitted, one after the other.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.engine import (
    LARGE,
    EngineParams,
    EngineState,
    SharedBlocks,
    anywhere,
    blocks_for,
    full_blocks,
    lowest,
    prefix_sum,
    total,
)
from jaxroute.simulator.prefix_runs import (
    allocate,
    common_blocks,
    free_blocks,
    hashed_blocks,
    look_up,
    one_of,
    path_at,
    release,
    take,
)


class Turns(struct.PyTreeNode):
    """What was decided so far."""

    goes_on: jax.Array  # bool [...], another request may be admitted
    num_running: jax.Array  # int32 [...]
    tokens: jax.Array  # int32 [S, ...]
    found: jax.Array  # int32 [S, ...], blocks that the admitted ones found
    cache: SharedBlocks


def take_turns(
    state: EngineState, params: EngineParams, asked: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, SharedBlocks]:
    """(tokens, boundary, blocks found, cache) after both loops. `asked` are the tokens that requests ask for, int32
    [S, ...], of which those of the running ones matter; `limit` is that of one request, int32 [...].
    """
    cache = state.cache
    assert isinstance(cache, SharedBlocks)
    tokens, num_running, cache = _continue_running(state, params, asked, cache)
    unfinished, position, budget = state.unfinished(), state.position, params.max_num_batched_tokens
    length = state.prompt_tokens + state.generated
    unknown = 0 if state.flight is None else jnp.where(tokens > 0, state.flight.sampled, state.flight.unhashed)

    def admit_next(turns: Turns) -> Turns:
        """Admits the head of `waiting` or nobody (rules B2 to B5)."""
        cache, running = turns.cache, unfinished & (position < turns.num_running)
        head = lowest(jnp.where(unfinished & ~running, position, LARGE))
        at = position == head
        computed = state.computed + turns.tokens + turns.found * params.block_size - unknown
        hashed = jnp.where(running, full_blocks(computed, params.block_size), 0)
        path, own_length = path_at(cache, at), one_of(length, at)
        most = jnp.maximum(full_blocks(own_length - 1, params.block_size), 0)
        found, held = look_up(cache, path, hashed, most)
        left = budget - total(turns.tokens)
        wanted = jnp.minimum(own_length - found * params.block_size, limit)
        tokens = jnp.minimum(wanted, left)
        blocks = blocks_for(found * params.block_size + tokens, params.block_size)
        whole = jnp.where(params.reserve_full_isl, blocks_for(own_length, params.block_size), 0)
        joins = (
            turns.goes_on
            & (tokens > 0)
            & ((tokens == wanted) | params.enable_chunked_prefill)
            & (total(running) < params.max_num_seqs)
            & (free_blocks(cache) + held >= jnp.maximum(blocks, whole))
        )
        # A request that does not join finds nothing and allocates nothing, so that the cache does not change.
        found = jnp.where(joins, found, 0)
        cache = allocate(take(cache, path, found), jnp.where(joins, blocks - found, 0))
        return Turns(
            goes_on=joins & (total(unfinished & (position > head)) > 0),
            num_running=jnp.where(joins, head + 1, turns.num_running),
            tokens=turns.tokens + jnp.where(joins & at, tokens, 0),
            found=turns.found + jnp.where(at, found, 0),
            cache=cache,
        )

    may_admit = (total(unfinished & (position >= num_running)) > 0) & (num_running == state.num_running)
    turns = Turns(may_admit, num_running, tokens, jnp.zeros_like(tokens), cache)
    turns = jax.lax.while_loop(lambda turns: anywhere(turns.goes_on), admit_next, turns)
    return turns.tokens, turns.num_running, turns.found, turns.cache


def _continue_running(
    state: EngineState, params: EngineParams, asked: jax.Array, cache: SharedBlocks
) -> tuple[jax.Array, jax.Array, SharedBlocks]:
    """The running requests' tokens, int32 [S, ...], the boundary, and the cache (rules 2, 3, B9 and B10)."""
    unfinished, position = state.unfinished(), state.position
    running = unfinished & (position < state.num_running)
    wanted = jnp.where(running, asked, 0)
    capped = jnp.minimum(wanted, params.max_num_batched_tokens)
    tokens = jnp.clip(params.max_num_batched_tokens - (prefix_sum(capped) - capped), 0, wanted)
    held = jnp.where(running, blocks_for(state.computed, params.block_size), 0)
    hashed = hashed_blocks(state, params)
    need = jnp.where(running, blocks_for(state.computed + tokens, params.block_size) - held, 0)

    def preempt(carry: tuple[jax.Array, jax.Array, SharedBlocks]) -> tuple[jax.Array, jax.Array, SharedBlocks]:
        """The requests for which blocks suffice get them; then the last of `running` is preempted."""
        need, num_running, cache = carry
        short = total(need) > free_blocks(cache)
        served = short & (prefix_sum(need) <= free_blocks(cache))
        cache = allocate(cache, total(jnp.where(served, need, 0)))
        left = running & (position < num_running)
        victim = -lowest(jnp.where(short & left, -position, LARGE))
        at = position == victim
        cache = release(cache, at, left & ~at, hashed, held, params)
        need = jnp.where(served | at, 0, need)
        return need, jnp.where(short & (victim >= 0), victim, num_running), cache

    is_short = lambda carry: anywhere(total(carry[0]) > free_blocks(carry[2]))  # noqa: E731
    need, num_running, cache = jax.lax.while_loop(is_short, preempt, (need, state.num_running, cache))
    return jnp.where(position < num_running, tokens, 0), num_running, allocate(cache, total(need))


def head_is_blocked(
    state: EngineState,
    head: jax.Array,
    batch: jax.Array,
    blocks: tuple[jax.Array, jax.Array],
    params: EngineParams,
    limit: jax.Array,
) -> jax.Array:
    """bool [...]: the request in the only slot of `head` (bool [S, ...]) cannot join a batch of `batch` decodes.

    See `scheduler.only_decodes`. `blocks` are the sums of what each running request holds, now and after an iteration.
    This remains so unless a running request computes blocks that the head would find.
    """
    now, following = blocks
    assert isinstance(state.cache, SharedBlocks)
    cache = allocate(state.cache, following - now)
    path, hashed = path_at(cache, head), hashed_blocks(state, params)
    length = one_of(state.prompt_tokens + state.generated, head)
    most = jnp.maximum(full_blocks(length - 1, params.block_size), 0)
    found, held = look_up(cache, path, hashed, most)
    running = state.unfinished() & (state.position < state.num_running)
    may_find_more = total(running & (jnp.minimum(common_blocks(path, cache.path), most) > hashed)) > 0
    budget = params.max_num_batched_tokens - batch
    wanted = jnp.minimum(length - found * params.block_size, limit)
    tokens = jnp.minimum(wanted, budget)
    needed = jnp.where(params.reserve_full_isl, length, found * params.block_size + tokens)
    too_little = ((tokens < wanted) & ~params.enable_chunked_prefill) | (
        free_blocks(cache) + held < blocks_for(needed, params.block_size)
    )
    return (tokens <= 0) | (batch >= params.max_num_seqs) | (too_little & ~may_find_more)
