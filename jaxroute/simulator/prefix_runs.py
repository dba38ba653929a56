"""The prefix cache of requests that share prefixes (simulation.md section 1c): which blocks each one finds.

vLLM's free queue begins with blocks without content (before vLLM 0.23, released ones are ranges of nobody among the
others). The others are, by the event that released them, ranges of blocks
of one request (`engine.Runs`): what is cached includes all blocks before it, so nothing but the end of a range is ever
allocated, and nothing but its beginning is ever found. No block is stored one by one, and contents are compared by the
requests' paths (`engine.Path`).

This is exact if no content is in two blocks (docs/fidelity.md says when that happens). If all R ranges have blocks, the
oldest range becomes blank: the order of allocation is the same, but it is found no longer. Ranges stay in their places,
and a number for each says their order: to move them would write all arrays anew.
"""

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import (
    LARGE,
    EngineParams,
    EngineState,
    Path,
    Runs,
    SharedBlocks,
    anywhere,
    blocks_for,
    full_blocks,
    lowest,
    total,
)
from jaxroute.workload.request import Prefix


def path_of(prefix: Prefix, params: EngineParams) -> Path:
    """The path in full blocks, K of int32 [...], of a request's pieces in tokens, [K, ...]."""
    number = range(params.prefix_pieces)
    return Path(
        tuple(prefix.owner[k] for k in number), tuple(full_blocks(prefix.end[k], params.block_size) for k in number)
    )


def common_blocks(one: Path, others: Path) -> jax.Array:
    """int32 [S, ...] or [R, ...]: the leading blocks that a request (K of [...]) has in common with `others`."""
    pieces = zip(one.owner, one.end, others.owner, others.end, strict=True)
    common = [jnp.where(own == owner, jnp.minimum(own_end, end), 0) for own, own_end, owner, end in pieces]
    return jnp.stack(common).max(axis=0) if len(common) > 1 else common[0]


def free_blocks(cache: SharedBlocks) -> jax.Array:
    """int32 [...]: the length of the free queue."""
    first, end = cache.runs.bounds
    return cache.blank + total(end - first)


def hashed_blocks(state: EngineState, params: EngineParams) -> jax.Array:
    """int32 [S, ...]: blocks of the running requests with content; 0 for others."""
    known = state.computed if state.flight is None else state.computed - state.flight.unhashed  # rule C6
    running = state.unfinished() & (state.position < state.num_running)
    return jnp.where(running, full_blocks(known, params.block_size), 0)


def one_of(values: jax.Array, at: jax.Array) -> jax.Array:
    """[...]: what `values` [S, ...] are in the only slot of `at` (bool [S, ...]); 0 if there is none."""
    return total(jnp.where(at, values, 0))


def path_at(cache: SharedBlocks, at: jax.Array) -> Path:
    """K of int32 [...]: the path of the request in the only slot of `at` (bool [S, ...])."""
    return jax.tree.map(lambda leaf: one_of(leaf, at), cache.path)


def look_up(cache: SharedBlocks, path: Path, hashed: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The blocks that a request with this `path` finds, at most `most`, and those of them that running requests hold;
    int32 [...] (rules B2 and B4). `hashed` are the blocks of these with content, int32 [S, ...].
    """
    first, end = cache.runs.bounds
    held = jnp.max(jnp.minimum(common_blocks(path, cache.path), hashed), axis=0)
    free = jnp.max(jnp.where(first < end, jnp.minimum(common_blocks(path, cache.runs.path), end), 0), axis=0)
    return jnp.minimum(jnp.maximum(held, free), most), jnp.minimum(held, most)


def take(cache: SharedBlocks, path: Path, found: jax.Array) -> SharedBlocks:
    """The cache after the blocks that a request `found` (int32 [...]) left the free queue (rule B5)."""
    first, end = cache.runs.bounds
    taken = jnp.minimum(jnp.minimum(end, common_blocks(path, cache.runs.path)), found)
    return cache.replace(runs=cache.runs.replace(bounds=jnp.stack([jnp.maximum(first, taken), end])))


def allocate(cache: SharedBlocks, blocks: jax.Array) -> SharedBlocks:
    """The cache after this number of `blocks` (int32 [...]) was taken from the front of the free queue (rule B6)."""
    blank = jnp.minimum(blocks, cache.blank)
    (first, end), order = cache.runs.bounds, cache.runs.order[0]

    def evict(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Takes blocks of the oldest range. Usually few ranges lose some, and a cumulative sum takes longer."""
        left, end = carry
        at = order == lowest(jnp.where(first < end, order, LARGE))
        taken = jnp.minimum(left, one_of(end - first, at))
        return left - taken, end - jnp.where(at, taken, 0)

    # Where content was in two blocks, the counts may be too low.
    left = jnp.minimum(blocks - blank, total(end - first))
    _, end = jax.lax.while_loop(lambda carry: anywhere(carry[0] > 0), evict, (left, end))
    return cache.replace(blank=cache.blank - blank, runs=cache.runs.replace(bounds=jnp.stack([first, end])))


def release(
    cache: SharedBlocks, at: jax.Array, others: jax.Array, hashed: jax.Array, held: jax.Array, params: EngineParams
) -> SharedBlocks:
    """The cache after the request in the only slot of `at` released its blocks (rule B8).

    If there is none, the cache does not change. `others` (bool [S, ...]) hold blocks too; `hashed` and `held` are the
    numbers of blocks, int32 [S, ...].
    """
    path, own_hit, own = path_at(cache, at), one_of(cache.hit, at), one_of(hashed, at)
    # Blocks are shared because one of the two found them.
    common = jnp.minimum(common_blocks(path, cache.path), jnp.minimum(hashed, jnp.maximum(cache.hit, own_hit)))
    first = jnp.minimum(jnp.max(jnp.where(others, common, 0), axis=0), own)
    without_content = one_of(held, at) - own
    if params.unhashed_first:
        cache = cache.replace(blank=cache.blank + without_content)
    else:
        cache = _append(cache, jax.tree.map(jnp.zeros_like, path), jnp.zeros_like(own), without_content)
    return _append(cache, path, first, own)


def _append(cache: SharedBlocks, path: Path, first: jax.Array, end: jax.Array) -> SharedBlocks:
    """Puts a range behind the others, if it has blocks, in the place of one without, or else of the oldest one."""
    runs, adds = cache.runs, first < end
    blocks, order = runs.bounds[1] - runs.bounds[0], runs.order[0]
    number = lowest(jnp.where(blocks == 0, order - order.shape[0], order))
    number = jnp.where(number < 0, number + order.shape[0], number)
    here = adds & (order == number)

    def put(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(here, new[:, None], old)

    own = Path(jnp.stack(path.owner), jnp.stack(path.end))
    oldest = one_of(blocks, here)  # 0 where there was a place without
    runs = Runs(
        path=jax.tree.map(put, own, runs.path),
        bounds=put(jnp.stack([first, end]), runs.bounds),
        order=jnp.where(here, order.shape[0] - 1, order - (adds & (order > number)))[None],
    )
    return cache.replace(blank=cache.blank + oldest, runs=runs)


def after_finish(state: EngineState, cache: SharedBlocks, finished: jax.Array, params: EngineParams) -> SharedBlocks:
    """The cache after the requests `finished` (bool [S, ...]) released their blocks, in order; `state` is later."""
    full = full_blocks(state.prompt_tokens + state.generated - 1, params.block_size)  # the final token has no block
    hashed = jnp.where(finished, full, hashed_blocks(state, params))
    held = blocks_for(state.computed, params.block_size)
    running = state.unfinished() & (state.position < state.num_running)
    return _release_all(state.position, cache, finished, running, hashed, held, params)


def after_abort(state: EngineState, cache: SharedBlocks, aborted: jax.Array, params: EngineParams) -> SharedBlocks:
    """The cache after the running requests `aborted` (bool [S, ...]) released their blocks before their end, in order;
    `state` is earlier.
    """
    held = blocks_for(state.computed, params.block_size)
    others = state.unfinished() & (state.position < state.num_running) & ~aborted
    return _release_all(state.position, cache, aborted, others, hashed_blocks(state, params), held, params)


def _release_all(
    position: jax.Array,
    cache: SharedBlocks,
    leaving: jax.Array,
    others: jax.Array,
    hashed: jax.Array,
    held: jax.Array,
    params: EngineParams,
) -> SharedBlocks:
    def release_next(carry: tuple[jax.Array, SharedBlocks]) -> tuple[jax.Array, SharedBlocks]:
        left, cache = carry
        at = position == lowest(jnp.where(left, position, LARGE))
        left = left & ~at
        return left, release(cache, at, others | left, hashed, held, params)

    return jax.lax.while_loop(lambda carry: anywhere(total(carry[0]) > 0), release_next, (leaving, cache))[1]
