"""The scheduling decision of one iteration: vLLM's V1 scheduler without its loops (simulation.md section 1).

vLLM walks over `running`, preempting from the tail when blocks run out, and then over `waiting` until the first request
that cannot be admitted. Because the queue is one array in order, both walks together schedule a prefix of it:

- the token budget left for position i is the budget less what the positions before it want;
- a running request at i survives iff the blocks of positions 0..i, after this iteration, fit the cache. Victims are
  taken from the tail, so the survivors are the longest prefix that fits, and its tail is what vLLM preempts;
- a waiting request at i is admitted iff everyone before it is and its own conditions hold.

So the new boundary is the first position that fails: before the old one it means preemption (and no admission), behind
it admission. Cumulative sums and one minimum replace the loops.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.engine import LARGE, EngineParams, EngineState, anywhere, blocks_for, lowest, prefix_sum, total


class Decision(struct.PyTreeNode):
    """What one iteration does, for queues of S slots."""

    num_running: jax.Array  # int32 [...], the boundary afterwards
    tokens: jax.Array  # int32 [S, ...], tokens scheduled for each slot, 0 for the others
    preempted: jax.Array  # bool [S, ...]
    prefill_tokens: jax.Array  # int32 [...], np
    decodes: jax.Array  # int32 [...], nd
    context_tokens: jax.Array  # int32 [...], ctx
    used_blocks: jax.Array  # int32 [...], KV blocks held during the iteration


def prefill_limit(params: EngineParams) -> jax.Array:
    """Most tokens of one request in an iteration, int32 [...]: the long-prefill threshold, where there is one."""
    threshold = params.long_prefill_token_threshold
    return jnp.where(threshold > 0, threshold, LARGE)


def schedule(params: EngineParams, state: EngineState) -> Decision:
    """The decision for the iteration that starts now. Numbers in comments are the rules of simulation.md section 1."""
    position = state.position
    present = state.unfinished()
    running = position < state.num_running
    length = state.prompt_tokens + state.generated

    # 2 and 4: tokens that each request asks for.
    room = jnp.where(running, params.max_model_len - 1 - state.computed, LARGE)
    wanted = jnp.minimum(jnp.minimum(length - state.computed, prefill_limit(params)), room)
    wanted = jnp.where(present, jnp.maximum(wanted, 0), 0)
    budget = params.max_num_batched_tokens

    def take_turns(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, present, wanted, _ = carry
        # Each gets what those before it leave of the budget.
        capped = jnp.minimum(wanted, budget)
        tokens = jnp.clip(budget - (prefix_sum(capped) - capped), 0, wanted)
        # 3 and 5: blocks held afterwards by everyone up to here; for an admission also with the whole prompt.
        blocks = jnp.where(present, blocks_for(state.computed + tokens, params.block_size), 0)
        blocks_up_to = prefix_sum(blocks)
        fits = blocks_up_to <= params.usable_blocks
        whole = blocks_up_to - blocks + blocks_for(length, params.block_size)
        whole_fits = (whole <= params.usable_blocks) | ~params.reserve_full_isl
        unchunked = (tokens == wanted) | params.enable_chunked_prefill
        seated = prefix_sum(present) <= params.max_num_seqs
        passes = fits & (running | ((tokens > 0) & unchunked & whole_fits & seated))
        failed = lowest(jnp.where(present & ~passes, position, LARGE))
        # All true, but not a constant, which Triton does not take as the result of a loop's round.
        return ample | ~ample, passes, tokens, jnp.minimum(failed, state.num_requests)

    # Mostly there is enough of everything for everyone, and then nobody needs to wait their turn (who does so anyway
    # gets the same). A loop of at most one round, since under `vmap` a loop is left out where no engine needs it, and
    # a branch is not. What it works on must come in by the carry and change there: XLA computes what a loop does not
    # change ahead of it.
    most = jnp.where(running | ~params.reserve_full_isl, state.computed + wanted, length)
    most_blocks = total(jnp.where(present, blocks_for(most, params.block_size), 0))
    ample = (total(wanted) <= budget) & (most_blocks <= params.usable_blocks) & (total(present) <= params.max_num_seqs)
    all_at_once = (ample, present, wanted, state.num_requests)
    _, _, tokens, num_running = jax.lax.while_loop(lambda carry: anywhere(~carry[0]), take_turns, all_at_once)

    blocks = blocks_for(state.computed + tokens, params.block_size)
    scheduled = present & (position < num_running)
    tokens = jnp.where(scheduled, tokens, 0)
    decode = (tokens == 1) & (state.generated > 0) & (state.computed == length - 1)
    decodes = total(decode)
    return Decision(
        num_running=num_running,
        tokens=tokens,
        preempted=present & running & (position >= num_running),
        prefill_tokens=total(tokens) - decodes,
        decodes=decodes,
        context_tokens=total(jnp.where(tokens > 0, state.computed + tokens, 0)),
        used_blocks=total(jnp.where(scheduled, blocks, 0)),
    )
