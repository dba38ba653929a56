"""The scheduling decision of an iteration under `vllm_v1`: vLLM's V1 scheduler without loops (simulation.md section 1).

vLLM iterates over `running`, preempting from the tail when blocks run out, and then over `waiting` until the first
request that it cannot admit. The queue is one ordered array, so both loops together schedule a prefix of it:

- the token budget left for position i is the budget less the tokens of the positions before it;
- a running request at i survives iff the blocks of positions 0..i after this iteration fit the cache: victims are taken
  from the tail, so the survivors are the longest prefix that fits, and vLLM preempts the others;
- a waiting request at i is admitted iff all requests before it are admitted and its own conditions hold.

The new boundary is the first position that fails. If it is before the old boundary, requests are preempted (and none is
admitted); if it is behind, requests are admitted. Cumulative sums and one minimum replace the loops.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.engine import (
    LARGE,
    EngineParams,
    EngineState,
    Flight,
    OwnBlocks,
    SharedBlocks,
    anywhere,
    blocks_for,
    lowest,
    prefix_sum,
    total,
)
from jaxroute.simulator.prefix_cache import after_schedule, allocate, held_blocks, where_found
from jaxroute.simulator.prefix_runs import free_blocks
from jaxroute.simulator.scheduler_prefixes import head_is_blocked, take_turns


class SchedulerOutput(struct.PyTreeNode):
    """The decision of one iteration for queues of S slots; the names are vLLM's."""

    num_running: jax.Array  # int32 [...], the new boundary
    tokens: jax.Array  # int32 [S, ...], tokens scheduled for each slot, 0 for the others
    preempted: jax.Array  # bool [S, ...]
    prefill_tokens: jax.Array  # int32 [...], np
    decodes: jax.Array  # int32 [...], nd
    context_tokens: jax.Array  # int32 [...], ctx
    used_blocks: jax.Array  # int32 [...], KV blocks held during the iteration
    ignored: jax.Array | None = None  # bool [S, ...], vllm_v0: dropped because they can never fit
    found: jax.Array | None = None  # int32 [S, ...], prefix caching: cached blocks of an admitted request
    cache: OwnBlocks | SharedBlocks | None = None  # prefix caching: the cache afterwards


def prefill_limit(state: EngineState, params: EngineParams) -> jax.Array:
    """Maximum tokens of one request per iteration, int32 [...]: the long-prefill threshold, if it is set (rule A1)."""
    threshold = params.long_prefill_token_threshold
    limited = threshold > 0
    if not params.threshold_when_alone:
        limited &= total(state.unfinished()) > 1
    return jnp.where(limited, threshold, LARGE)


def schedule(state: EngineState, params: EngineParams) -> SchedulerOutput:
    """The decision for the iteration that starts now. Numbers in comments are the rules of simulation.md section 1."""
    position = state.position
    unfinished = state.unfinished()
    running = position < state.num_running
    length = state.prompt_tokens + state.generated
    may_get = unfinished
    if state.flight is not None:  # rules C2 and C3
        length += state.flight.sampled
        may_get &= ~_ends_when_delivered(state, state.flight)
    limit = prefill_limit(state, params)
    budget = params.max_num_batched_tokens

    def asked(computed: jax.Array) -> jax.Array:
        """Rules 2 and 4: the tokens that each request asks for."""
        room = jnp.where(running, params.max_model_len - 1 - computed, LARGE)
        wanted = jnp.minimum(jnp.minimum(length - computed, limit), room)
        return jnp.where(may_get, jnp.maximum(wanted, 0), 0)

    def in_turn(unfinished: jax.Array, wanted: jax.Array, computed: jax.Array) -> tuple[jax.Array, ...]:
        """Which requests pass, the tokens of each, and the first position that fails."""
        # Each request gets what the requests before it leave of the budget.
        capped = jnp.minimum(wanted, budget)
        tokens = jnp.clip(budget - (prefix_sum(capped) - capped), 0, wanted)
        # Rules 3 and 5: blocks held afterwards by all requests up to here; an admission also counts its whole prompt.
        blocks = jnp.where(unfinished, blocks_for(computed + tokens, params.block_size), 0)
        blocks_up_to = prefix_sum(blocks)
        fits = blocks_up_to <= params.usable_blocks
        whole = blocks_up_to - blocks + blocks_for(length, params.block_size)
        whole_fits = (whole <= params.usable_blocks) | ~params.reserve_full_isl
        unchunked = (tokens == wanted) | params.enable_chunked_prefill
        seated = prefix_sum(unfinished) <= params.max_num_seqs
        passes = fits & (running | ((tokens > 0) & unchunked & whole_fits & seated))
        failed = lowest(jnp.where(unfinished & ~passes, position, LARGE))
        return passes, tokens, jnp.minimum(failed, state.num_requests)

    # Usually there are enough tokens, seats and blocks for every request, and the sequential rules change nothing. They
    # are a loop of at most one round: under `vmap`, a loop is skipped if no engine needs it, and a branch is not. The
    # loop must carry and change its inputs, because XLA computes whatever a loop does not change ahead of it.
    wanted = asked(state.computed)
    most = jnp.where(running | ~params.reserve_full_isl, state.computed + wanted, length)
    most_blocks = total(jnp.where(unfinished, blocks_for(most, params.block_size), 0))
    ample = (
        (total(wanted) <= budget) & (most_blocks <= params.usable_blocks) & (total(unfinished) <= params.max_num_seqs)
    )
    computed, found, ahead, cache = state.computed, None, None, state.cache
    if cache is None:

        def in_turns(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            _, unfinished, wanted, _ = carry
            # All True, but not a constant, which Triton rejects as the result of a round of a loop.
            return ample | ~ample, *in_turn(unfinished, wanted, state.computed)

        all_at_once = (ample, unfinished, wanted, state.num_requests)
        _, _, tokens, num_running = jax.lax.while_loop(lambda carry: anywhere(~carry[0]), in_turns, all_at_once)
    elif isinstance(cache, SharedBlocks):
        tokens, num_running, found, cache = take_turns(state, params, wanted, limit)
        computed = computed + found * params.block_size
    else:
        tokens, num_running, found, ahead = _with_own_blocks(state, params, ample, wanted, asked, in_turn)
        computed = computed + found * params.block_size

    blocks = blocks_for(computed + tokens, params.block_size)
    scheduled = unfinished & (position < num_running)
    tokens = jnp.where(scheduled, tokens, 0)
    has_token = state.generated > 0
    if state.flight is not None:
        has_token |= state.flight.sampled
    decode = (tokens == 1) & has_token & (computed == length - 1)
    decodes = total(decode)
    output = SchedulerOutput(
        num_running=num_running,
        tokens=tokens,
        preempted=unfinished & running & (position >= num_running),
        prefill_tokens=total(tokens) - decodes,
        decodes=decodes,
        context_tokens=total(jnp.where(tokens > 0, computed + tokens, 0)),
        used_blocks=total(jnp.where(scheduled, blocks, 0)),
    )
    if found is not None and isinstance(cache, SharedBlocks):
        hit = jnp.where(position < state.num_running, cache.hit, found)
        used = params.usable_blocks - free_blocks(cache)  # what several requests hold is there once
        output = output.replace(found=found, cache=cache.replace(hit=hit), used_blocks=used)
    elif found is not None and ahead is not None and isinstance(cache, OwnBlocks):
        own, before = jnp.where(scheduled, found, 0), ahead

        def update(cache: OwnBlocks) -> OwnBlocks:
            need = jnp.where(scheduled, blocks - own - held_blocks(state, params), 0)
            return after_schedule(state, output.preempted, own, before, need, params)

        output = output.replace(found=own, cache=where_found(cache, update, output.preempted))
    return output


def _ends_when_delivered(state: EngineState, flight: Flight) -> jax.Array:
    """bool [S, ...]: the token in flight is known to be the last one (rule C3)."""
    return flight.sampled & flight.known_end & (state.generated + 1 >= state.target_tokens)


def _with_own_blocks(
    state: EngineState,
    params: EngineParams,
    ample: jax.Array,
    wanted: jax.Array,
    asked: Callable[[jax.Array], jax.Array],
    in_turn: Callable[..., tuple[jax.Array, ...]],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(tokens, boundary, blocks found, `OwnBlocks.ahead`) with prefix caching of requests that share nothing.

    What a request finds depends on the blocks that the requests before it take. So one request that may find blocks is
    looked up after the other, in order of the queue; the last round decides for all.
    """
    cache, position, unfinished = state.cache, state.position, state.unfinished()
    assert isinstance(cache, OwnBlocks)
    owners = unfinished & (position >= state.num_running) & (cache.found > 0)
    ample &= total(owners) == 0

    def look_up(start: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        held = held_blocks(state, params)

        def look_up_next(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            done, found, ahead, last, _, _ = carry
            computed = state.computed + found * params.block_size
            _, tokens, failed = in_turn(unfinished, asked(computed), computed)
            # The request that was looked up last takes its blocks out of the queue, if it is admitted (rule B5).
            at_last = position == last
            taken = jnp.where(failed > last, total(jnp.where(at_last, found, 0)), 0)
            behind = ahead > total(jnp.where(at_last, ahead, 0))
            ahead = jnp.where(behind, ahead - taken, ahead)
            following = lowest(jnp.where(owners & (position > last), position, LARGE))
            goes_on = (following <= failed) & (following < LARGE) & (failed >= state.num_running)
            before = unfinished & (position < following)
            blocks = blocks_for(computed + tokens, params.block_size) - held - found
            evicted = total(jnp.where(before, blocks, 0)) - ahead
            left = jnp.maximum(cache.found - jnp.maximum(evicted, 0), 0)
            looked_up = jnp.where(goes_on & (position == following), left, found)
            new = (~goes_on, looked_up, ahead, jnp.where(goes_on, following, last), tokens, failed)
            return jax.tree.map(lambda new, old: jnp.where(done, old, new), new, carry)

        return jax.lax.while_loop(lambda carry: anywhere(~carry[0]), look_up_next, start)

    nothing = jnp.zeros_like(state.computed)
    start = (ample, nothing, cache.ahead, jnp.full_like(state.num_requests, -1), wanted, state.num_requests)
    _, found, ahead, _, tokens, num_running = jax.lax.cond(anywhere(~ample), look_up, lambda start: start, start)
    return tokens, num_running, found, ahead


def only_decodes(
    state: EngineState,
    running: jax.Array,
    batch: jax.Array,
    blocks_after: Callable[[jax.Array | int], jax.Array],
    params: EngineParams,
) -> jax.Array:
    """bool [...]: while memory suffices, the next iterations only decode `running` (bool [S, ...], `batch` requests,
    int32 [...]) and admit nobody. `blocks_after(n)` are the KV blocks that these requests hold after n iterations.
    """
    length = state.prompt_tokens + state.generated
    if state.flight is None:
        decoding = (state.generated > 0) & (state.computed == length - 1)
    else:
        decoding = state.flight.sampled & (state.computed == length)
    plain = (total(running & decoding) == batch) & (batch > 0) & (batch <= params.max_num_batched_tokens)
    return plain & _is_blocked(state, batch, blocks_after, params)


def _is_blocked(
    state: EngineState, batch: jax.Array, blocks_after: Callable[[jax.Array | int], jax.Array], params: EngineParams
) -> jax.Array:
    """bool [...]: the head of `waiting` cannot join a batch of `batch` decodes that hold `blocks_after` n iterations.

    Rules 4 and 5. This remains so while the batch only decodes: seats and budget do not change, blocks only decrease,
    and a block that the head finds no longer is one that it then needs.
    """
    head = state.position == state.num_running  # never a finished request, which was running
    nobody = state.num_running == state.num_requests
    if state.flight is not None:  # rule C7: it may have waited
        waiting = state.unfinished() & (state.position >= state.num_running)
        head = state.position == lowest(jnp.where(waiting, state.position, LARGE))
        nobody = total(waiting) == 0
    length = total(jnp.where(head, state.prompt_tokens + state.generated, 0))
    next_blocks = blocks_after(1)
    if isinstance(state.cache, SharedBlocks):
        blocks = (blocks_after(0), next_blocks)
        return nobody | head_is_blocked(state, head, batch, blocks, params, prefill_limit(state, params))
    budget = params.max_num_batched_tokens - batch
    if state.cache is None:
        wanted = jnp.minimum(length, prefill_limit(state, params))
        tokens = jnp.minimum(wanted, budget)
        held = jnp.where(params.reserve_full_isl, jnp.maximum(length, tokens), tokens)
    else:
        own = state.cache
        own = where_found(own, lambda cache: allocate(cache, next_blocks - blocks_after(0)))
        found = total(jnp.where(head, own.found, 0)) * params.block_size
        wanted = jnp.minimum(length - found, prefill_limit(state, params))
        tokens = jnp.minimum(wanted, budget)
        held = jnp.where(params.reserve_full_isl, length, found + tokens)
    return (
        nobody
        | (tokens <= 0)
        | ((tokens < wanted) & ~params.enable_chunked_prefill)
        | (batch >= params.max_num_seqs)
        | (next_blocks + blocks_for(held, params.block_size) > params.usable_blocks)
    )


def can_serve(prompt_tokens: jax.Array, output_tokens: jax.Array, params: EngineParams) -> jax.Array:
    """bool [...]: whether a request of these lengths can finish (rule 8)."""
    length = jnp.minimum(prompt_tokens + output_tokens, params.max_model_len)
    feasible = blocks_for(length - 1, params.block_size) <= params.usable_blocks
    whole = prompt_tokens + output_tokens - 1
    feasible &= params.enable_chunked_prefill | (whole <= params.max_num_batched_tokens)
    return feasible & (prompt_tokens < params.max_model_len)
