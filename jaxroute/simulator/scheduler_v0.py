"""The scheduling decision of one iteration under `vllm_v0`: vLLM's V0 scheduler (simulation.md section 1a).

An iteration either prefills, what it can admit from the head of `waiting`, or decodes all of `running`. As V1's, its
walks over the queue become prefix sums and minima; the victims of a preemption are a tail of `running` here too, so
the queue stays one array with a boundary. Requests that are ignored stay in their slots, marked by `IGNORED`, until the
slots are compacted. With asynchronous output processing, a finished request whose `computed` is above 0 lingers: it
still holds its seat and blocks, for one iteration.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import (
    IGNORED,
    LARGE,
    NEVER,
    EngineParams,
    EngineState,
    blocks_for,
    lowest,
    prefix_sum,
    total,
)
from jaxroute.simulator.scheduler import Decision


def _lingers(params: EngineParams, state: EngineState) -> jax.Array:
    """bool [S, ...]: finished, but the engine has not looked at that yet (rule 11)."""
    assert params.async_output_proc is not None
    ended = (state.finish_time > IGNORED) & (state.finish_time < NEVER)
    return params.async_output_proc & (state.position < state.num_requests) & ended & (state.computed > 0)


def present(params: EngineParams, state: EngineState) -> jax.Array:
    """bool [S, ...]: the request waits, runs, or has finished and still holds its seat."""
    return state.unfinished() | _lingers(params, state)


def can_serve(params: EngineParams, prompt_tokens: jax.Array, output_tokens: jax.Array) -> jax.Array:
    """bool [...]: the prompt would not be ignored (rule 3); one that grows too large later is, then."""
    del output_tokens
    return (prompt_tokens < params.max_model_len) & ~_too_large(params, prompt_tokens)


def _too_large(params: EngineParams, length: jax.Array) -> jax.Array:
    """Rule 3 (a) and (b): a request of this `length` is ignored when it is the head of `waiting`."""
    longest = jnp.minimum(params.max_model_len, params.max_num_batched_tokens)
    return (length > longest) | (blocks_for(length, params.block_size) > admissible_blocks(params))


def admissible_blocks(params: EngineParams) -> jax.Array:
    """int32 [...]: KV blocks that admissions may fill: all but the watermark."""
    assert params.watermark_blocks is not None
    return params.usable_blocks - params.watermark_blocks


def schedule(params: EngineParams, state: EngineState) -> Decision:
    """The decision for the iteration that starts now. Numbers in comments are the rules of simulation.md section 1a."""
    position, length = state.position, state.prompt_tokens + state.generated
    running = present(params, state) & (position < state.num_running)
    waiting = state.unfinished() & (position >= state.num_running)
    held = jnp.where(running, blocks_for(state.computed, params.block_size), 0)

    # 3: everyone before the first that has to wait is admitted or ignored.
    too_large = waiting & _too_large(params, length)
    candidate = waiting & ~too_large
    need = jnp.where(candidate, blocks_for(length, params.block_size), 0)
    fits = total(held) + prefix_sum(need) <= admissible_blocks(params)
    fits &= prefix_sum(jnp.where(candidate, length, 0)) <= params.max_num_batched_tokens
    fits &= total(running) + prefix_sum(candidate) <= params.max_num_seqs
    stop = jnp.minimum(lowest(jnp.where(candidate & ~fits, position, LARGE)), state.num_requests)
    admitted = candidate & (position < stop)
    prefills = total(admitted) > 0

    # 5 and 6: a request survives iff, with everyone behind it preempted, a block is free when its turn comes.
    passed_over = running & (length > params.max_model_len)  # 13
    decodes = running & ~passed_over
    grows = jnp.where(decodes, blocks_for(state.computed + 1, params.block_size) - held, 0)
    held_up_to, taken_before = prefix_sum(held), prefix_sum(grows) - grows
    out = lowest(jnp.where(decodes & (held_up_to + taken_before >= params.usable_blocks), position, LARGE))
    # One that is passed over needs no block, but can be a victim of the last that had its turn before it.
    last = -lowest(jnp.where(decodes & (position < out), -position, 1))
    taken = total(jnp.where(position < last, grows, 0))
    victim = passed_over & (last >= 0) & (position > last) & (held_up_to + taken >= params.usable_blocks)
    out = jnp.minimum(out, lowest(jnp.where(victim, position, LARGE)))
    survives = running & (prefills | (position < out))
    preempted = running & ~survives & state.unfinished()  # 14: a victim that has finished is only freed

    tokens = jnp.where(prefills, jnp.where(admitted, length, 0), decodes & survives)
    scheduled = total(tokens)
    return Decision(
        num_running=jnp.minimum(stop, lowest(jnp.where(preempted, position, LARGE))),
        tokens=tokens,
        preempted=preempted,
        prefill_tokens=jnp.where(prefills, scheduled, 0),
        decodes=jnp.where(prefills, 0, scheduled),
        context_tokens=total(jnp.where(tokens > 0, state.computed + tokens, 0)),
        used_blocks=total(jnp.where(survives, held, 0) + jnp.where(prefills, need * admitted, grows * survives)),
        ignored=too_large & (position < stop),
    )


def settle(
    params: EngineParams, before: EngineState, after: EngineState, ignored: jax.Array, iteration: jax.Array
) -> EngineState:
    """`after` the iteration of this number: frees what lingered `before` it, and marks who was `ignored` in it.

    The `computed` of an ignored request is the number of the iteration.
    """
    computed = jnp.where(before.unfinished(), after.computed, before.computed)
    computed = jnp.where(_lingers(params, before), 0, computed)  # 15
    return after.replace(
        computed=jnp.where(ignored, iteration, computed),
        finish_time=jnp.where(ignored, IGNORED, after.finish_time),
    )


def only_decodes(
    params: EngineParams,
    state: EngineState,
    running: jax.Array,
    batch: jax.Array,
    blocks_after: Callable[[jax.Array | int], jax.Array],
) -> jax.Array:
    """bool [...]: the iterations that follow decode `running`, and nobody else gets on, while memory lasts.

    Not while somebody lingers, who is decoded once more.
    """
    head = state.position == state.num_running
    length = total(jnp.where(head, state.prompt_tokens + state.generated, 0))
    need = blocks_for(length, params.block_size)
    waits = (batch >= params.max_num_seqs) | (blocks_after(0) + need > admissible_blocks(params))
    blocked = (state.num_running == state.num_requests) | (waits & ~_too_large(params, length))
    return (batch > 0) & (total(_lingers(params, state)) == 0) & blocked
