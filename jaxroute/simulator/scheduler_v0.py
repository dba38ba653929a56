"""The scheduling decision of one iteration under `vllm_v0`: vLLM's V0 scheduler (simulation.md section 1a).

An iteration either prefills the requests that it can admit from the head of `waiting`, or decodes all of `running`. As
for V1, prefix sums and minima replace its loops over the queue. The victims of a preemption are again a tail of
`running`, so the queue remains one array with a boundary. Ignored requests stay in their slots, marked by `IGNORED`,
until the slots are compacted. With asynchronous output processing, a finished request whose `computed` is above 0
lingers: it holds its seat and blocks for one more iteration.
"""

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
from jaxroute.simulator.scheduler import SchedulerOutput


def _lingers(state: EngineState, params: EngineParams) -> jax.Array:
    """bool [S, ...]: finished, but the engine has not checked this yet (rule 11)."""
    assert params.async_output_proc is not None
    ended = (state.finish_time > IGNORED) & (state.finish_time < NEVER)
    return params.async_output_proc & (state.position < state.num_requests) & ended & (state.computed > 0)


def occupies(state: EngineState, params: EngineParams) -> jax.Array:
    """bool [S, ...]: the request waits, runs, or has finished and still holds its seat."""
    return state.unfinished() | _lingers(state, params)


def can_serve(prompt_tokens: jax.Array, output_tokens: jax.Array, params: EngineParams) -> jax.Array:
    """bool [...]: the prompt would not be ignored (rule 3). A request that grows too large is ignored later."""
    del output_tokens
    return (prompt_tokens < params.max_model_len) & ~_too_large(prompt_tokens, params)


def _too_large(length: jax.Array, params: EngineParams) -> jax.Array:
    """Rule 3 (a) and (b): a request of this `length` is ignored at the head of `waiting`."""
    longest = jnp.minimum(params.max_model_len, params.max_num_batched_tokens)
    return (length > longest) | (blocks_for(length, params.block_size) > admissible_blocks(params))


def admissible_blocks(params: EngineParams) -> jax.Array:
    """int32 [...]: KV blocks that admissions may fill, which are all but the watermark."""
    assert params.watermark_blocks is not None
    return params.usable_blocks - params.watermark_blocks


def schedule(state: EngineState, params: EngineParams) -> SchedulerOutput:
    """The decision for the iteration that starts now. Numbers in comments are the rules of simulation.md section 1a."""
    position, length = state.position, state.prompt_tokens + state.generated
    running = occupies(state, params) & (position < state.num_running)
    waiting = state.unfinished() & (position >= state.num_running)
    held = jnp.where(running, blocks_for(state.computed, params.block_size), 0)

    # Rule 3: all requests before the first one that has to wait are admitted or ignored.
    too_large = waiting & _too_large(length, params)
    candidate = waiting & ~too_large
    need = jnp.where(candidate, blocks_for(length, params.block_size), 0)
    fits = total(held) + prefix_sum(need) <= admissible_blocks(params)
    fits &= prefix_sum(jnp.where(candidate, length, 0)) <= params.max_num_batched_tokens
    fits &= total(running) + prefix_sum(candidate) <= params.max_num_seqs
    stop = jnp.minimum(lowest(jnp.where(candidate & ~fits, position, LARGE)), state.num_requests)
    admitted = candidate & (position < stop)
    prefills = total(admitted) > 0

    # Rules 5 and 6: a request survives iff a block is free in its turn after all requests behind it are preempted.
    passed_over = running & (length > params.max_model_len)  # rule 13
    decodes = running & ~passed_over
    grows = jnp.where(decodes, blocks_for(state.computed + 1, params.block_size) - held, 0)
    held_up_to, taken_before = prefix_sum(held), prefix_sum(grows) - grows
    out = lowest(jnp.where(decodes & (held_up_to + taken_before >= params.usable_blocks), position, LARGE))
    # A skipped request needs no block, but can be the victim of the last request that had its turn before it.
    last = -lowest(jnp.where(decodes & (position < out), -position, 1))
    taken = total(jnp.where(position < last, grows, 0))
    victim = passed_over & (last >= 0) & (position > last) & (held_up_to + taken >= params.usable_blocks)
    out = jnp.minimum(out, lowest(jnp.where(victim, position, LARGE)))
    survives = running & (prefills | (position < out))
    preempted = running & ~survives & state.unfinished()  # rule 14: a finished victim is only freed

    tokens = jnp.where(prefills, jnp.where(admitted, length, 0), decodes & survives)
    scheduled = total(tokens)
    return SchedulerOutput(
        num_running=jnp.minimum(stop, lowest(jnp.where(preempted, position, LARGE))),
        tokens=tokens,
        preempted=preempted,
        prefill_tokens=jnp.where(prefills, scheduled, 0),
        decodes=jnp.where(prefills, 0, scheduled),
        context_tokens=total(jnp.where(tokens > 0, state.computed + tokens, 0)),
        used_blocks=total(jnp.where(survives, held, 0) + jnp.where(prefills, need * admitted, grows * survives)),
        ignored=too_large & (position < stop),
    )


def finished(state: EngineState, params: EngineParams) -> jax.Array:
    """bool [S, ...]: the request has its last token or was ignored, and no longer holds its seat."""
    ended = (state.position < state.num_requests) & (state.finish_time < NEVER)
    return ended & ~_lingers(state, params)


def after_iteration(
    before: EngineState, after: EngineState, output: SchedulerOutput, iteration: jax.Array, params: EngineParams
) -> EngineState:
    """`after` the iteration with this number (int32 [...]), corrected: a request that is decoded once more yields no
    token (rule 12) and then frees its blocks (15); ignored requests are marked (3), with the number as `computed`.
    """
    assert output.ignored is not None
    unfinished = before.unfinished()
    computed = jnp.where(unfinished, after.computed, jnp.where(_lingers(before, params), 0, before.computed))
    finish_time = jnp.where(unfinished, after.finish_time, before.finish_time)
    return after.replace(
        generated=jnp.where(unfinished, after.generated, before.generated),
        computed=jnp.where(output.ignored, iteration, computed),
        finish_time=jnp.where(output.ignored, IGNORED, finish_time),
    )


def only_decodes(
    state: EngineState,
    running: jax.Array,
    batch: jax.Array,
    blocks_after: Callable[[jax.Array | int], jax.Array],
    params: EngineParams,
) -> jax.Array:
    """bool [...]: while memory suffices, the next iterations only decode `running` and admit nobody.

    False while a request lingers, because it is decoded once more.
    """
    head = state.position == state.num_running
    length = total(jnp.where(head, state.prompt_tokens + state.generated, 0))
    need = blocks_for(length, params.block_size)
    waits = (batch >= params.max_num_seqs) | (blocks_after(0) + need > admissible_blocks(params))
    blocked = (state.num_running == state.num_requests) | (waits & ~_too_large(length, params))
    return (batch > 0) & (total(_lingers(state, params)) == 0) & blocked
