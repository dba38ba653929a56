"""Runs an engine, one iteration at a time or by jumps from event to event. Both give the same schedule.

Between two events the batch is constant and every running request gains one token per iteration, so the duration of
several decode iterations has a closed form (latency.py). A jump consists of one scheduled iteration of any kind and of
the plain decode iterations that follow it until the next event. An event is the time to stop at, a completion, or a KV
block that is not available.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator import prefix_cache, prefix_runs
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import (
    LARGE,
    NEVER,
    EngineParams,
    EngineState,
    OwnBlocks,
    SharedBlocks,
    anywhere,
    lowest,
    total,
)
from jaxroute.simulator.latency import decode_run, iteration_time, iterations_started_before, run_time
from jaxroute.simulator.scheduler import SchedulerOutput


class EngineWork(struct.PyTreeNode):
    """What engines did while they were advanced. Counts are int32 [...], times float [...] in seconds."""

    iterations: jax.Array
    idle_iterations: jax.Array  # consecutive iterations, up to now, that scheduled nothing; unlimited in a stall
    prefill_tokens: jax.Array  # sum of np
    decodes: jax.Array  # sum of nd
    context_tokens: jax.Array  # sum of ctx
    busy_time: jax.Array  # sum of the durations of iterations
    block_seconds: jax.Array  # KV blocks held, integrated over busy time; assumed to grow linearly in a run

    @classmethod
    def none(cls, shape: tuple[int, ...] = ()) -> EngineWork:
        """Zero work of engines with these trailing axes."""
        count, time = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, float)
        return cls(count, count, count, count, count, time, time)


class Jump(NamedTuple):
    """One round of `advance`: an iteration and the plain decode iterations that follow it."""

    runs: jax.Array  # bool [...], the round takes place; if not, `after` is `before`, and the rest means nothing
    before: EngineState
    work_before: EngineWork
    output: SchedulerOutput  # of the iteration
    middle: EngineState  # after the iteration
    work_middle: EngineWork
    stalled: jax.Array  # bool [...], the iteration changed nothing
    after: EngineState  # after the decode iterations
    work_after: EngineWork


def run_iteration(
    state: EngineState, work: EngineWork, params: EngineParams
) -> tuple[EngineState, EngineWork, SchedulerOutput]:
    """Schedules and executes one iteration, whose tokens appear at its end.

    With asynchronous scheduling, it is scheduled, and the batch before it ends: that one's tokens appear (rule C1).
    """
    own = rules(params)
    output = own.schedule(state, params)
    duration = iteration_time(
        params.latency, output.prefill_tokens, output.decodes, output.context_tokens.astype(state.clock.dtype)
    )
    # Rule 6: a request whose computed tokens reach its length yields a token. Rule 3: a preempted request restarts.
    computed = state.computed + output.tokens
    if output.found is not None:
        computed += output.found * params.block_size
    computed = jnp.where(state.position < output.num_running, computed, 0)
    sampled = (output.tokens > 0) & (computed >= state.prompt_tokens + state.generated)
    nothing = output.prefill_tokens + output.decodes == 0
    flight = state.flight
    if flight is None:
        clock = state.clock + duration
    else:
        sampled &= computed >= state.prompt_tokens + state.generated + flight.sampled
        is_first = flight.duration == 0
        # Without another batch, an empty iteration takes its time at once, and another one has yet to end.
        duration = jnp.where(nothing & ~is_first, 0, duration)
        clock = state.clock + jnp.where(is_first & nothing, duration, flight.duration)
        delivered = flight.sampled & state.unfinished()
        flight = flight.replace(
            duration=jnp.where(nothing, 0, duration),
            sampled=sampled,
            unhashed=flight.sampled & (output.tokens > 0),
        )
        sampled, nothing = delivered, nothing & is_first
    generated = state.generated + sampled
    after = state.replace(
        clock=clock,
        num_running=output.num_running,
        computed=computed,
        generated=generated,
        preemptions=state.preemptions + output.preempted,
        first_token_time=jnp.where(sampled & (state.generated == 0), clock, state.first_token_time),
        finish_time=jnp.where(sampled & (generated >= state.target_tokens), clock, state.finish_time),
        flight=flight,
    )
    if output.cache is not None:
        finished = state.unfinished() & (after.finish_time < NEVER) & (state.position < output.num_running)
        after = after.replace(cache=cache_rules(output.cache).after_finish(after, output.cache, finished, params))
    after = own.after_iteration(state, after, output, work.iterations, params)
    work = EngineWork(
        iterations=work.iterations + 1,
        idle_iterations=jnp.where(nothing, work.idle_iterations + 1, 0),
        prefill_tokens=work.prefill_tokens + output.prefill_tokens,
        decodes=work.decodes + output.decodes,
        context_tokens=work.context_tokens + output.context_tokens,
        busy_time=work.busy_time + duration,
        block_seconds=work.block_seconds + duration * output.used_blocks,
    )
    return after, work, output


def cache_rules(cache: OwnBlocks | SharedBlocks) -> Any:
    """The functions of this kind of prefix cache."""
    return prefix_runs if isinstance(cache, SharedBlocks) else prefix_cache


def _iterations_until_full(
    blocks_after: Callable[[jax.Array], jax.Array],
    usable: jax.Array,
    batch: jax.Array,
    context: jax.Array,
    enough: jax.Array,
    block_size: jax.Array,
) -> jax.Array:
    """Number of decode iterations for which `usable` KV blocks suffice, int32 [...]; values from `enough` on are equal.

    Rounding every request's last block up or down bounds the result within `block_size - 1`, and bisection finds it.
    The loop runs only for engines whose memory is short.
    """
    batch = jnp.maximum(batch, 1)
    spare = usable * block_size - context
    low = (spare - batch * (block_size - 1)) // batch

    def is_open(low: jax.Array, high: jax.Array) -> jax.Array:
        return (low < high) & (low < enough)

    def bisect(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high + 1) >> 1
        fits = blocks_after(middle) <= usable
        goes_on = is_open(low, high)
        return jnp.where(goes_on & fits, middle, low), jnp.where(goes_on & ~fits, middle - 1, high)

    return jax.lax.while_loop(lambda bounds: anywhere(is_open(*bounds)), bisect, (low, spare // batch))[0]


def run_decodes(
    state: EngineState,
    work: EngineWork,
    stalled: jax.Array,
    until: jax.Array,
    params: EngineParams,
    most_iterations: jax.Array | int,
    stall_iterations: jax.Array | int,
) -> tuple[EngineState, EngineWork]:
    """Runs the plain decode iterations up to the next event; none if the next iteration is of another kind.

    `stalled`, bool [...]: the last iteration changed nothing, so it repeats until a request arrives.
    """
    own = rules(params)
    running = state.unfinished() & (state.position < state.num_running) & ~stalled
    batch = total(running)
    context = total(jnp.where(running, state.computed, 0))

    def blocks_after(iterations: jax.Array | int) -> jax.Array:
        return total(jnp.where(running, own.held_blocks(state.computed + iterations, params), 0))

    plain = own.only_decodes(state, running, batch, blocks_after, params)
    left = state.target_tokens - state.generated
    gap = until - state.clock
    first, growth = decode_run(params.latency, batch, context.astype(state.clock.dtype))
    flight = state.flight
    if flight is None:
        started = iterations_started_before(first, growth, jnp.maximum(gap, 0))
    else:
        left -= flight.known_end  # rule C3
        # The first of these iterations is scheduled now, and the second one when the batch in flight ends.
        later = gap - flight.duration
        started = iterations_started_before(first, growth, jnp.maximum(later, 0))
        started = jnp.where(flight.duration > 0, jnp.where(later > 0, started + 1, 1), started)
    to_completion = lowest(jnp.where(running, left, LARGE))
    to_stall = stall_iterations - work.idle_iterations
    count = jnp.minimum(
        jnp.minimum(jnp.where(stalled, to_stall, to_completion), most_iterations - work.iterations), started
    )
    count = jnp.where((plain | stalled) & (gap > 0), count, 0)
    usable = params.usable_blocks - own.spare_blocks if own.spare_blocks else params.usable_blocks
    held = blocks_after(0)
    if isinstance(state.cache, SharedBlocks):  # what several requests hold is there once
        there = params.usable_blocks - prefix_runs.free_blocks(state.cache)
        usable, held = usable + held - there, there
    to_full = _iterations_until_full(
        blocks_after, usable, batch, context, jnp.where(stalled, 0, count), params.block_size
    )
    count = jnp.where(stalled, count, jnp.minimum(count, to_full))
    count = jnp.maximum(count, 0)

    duration = run_time(first, growth, count)
    clock = state.clock + duration
    added = jnp.where(running, count, 0)
    generated = state.generated + added
    first_token_time = state.first_token_time
    if flight is not None:
        # Each iteration ends the batch before it, so that the last one stays in flight.
        flies = (flight.duration > 0) & (count > 0)
        last = first + growth * (count - 1).astype(first.dtype)
        clock += jnp.where(flies, flight.duration - last, 0)
        delivers = (added > 0) & (state.generated == 0)
        first_token_time = jnp.where(delivers, state.clock + flight.duration, first_token_time)
        flight = flight.replace(
            duration=jnp.where(flies, last, flight.duration), unhashed=flight.unhashed | (added > 0)
        )
    finished = (added > 0) & (generated >= state.target_tokens)
    tokens = batch * count
    held = held + (0.5 * tokens / params.block_size if own.grows else 0)
    cache = state.cache
    if isinstance(cache, OwnBlocks):
        later = lambda cache: prefix_cache.allocate(cache, blocks_after(count) - blocks_after(0))  # noqa: E731
        state = state.replace(cache=prefix_cache.where_found(cache, later))
    elif cache is not None:
        state = state.replace(cache=prefix_runs.allocate(cache, blocks_after(count) - blocks_after(0)))
    state = state.replace(
        clock=clock,
        computed=state.computed + added,
        generated=generated,
        first_token_time=first_token_time,
        finish_time=jnp.where(finished, clock, state.finish_time),
        flight=flight,
    )
    if state.cache is not None:
        state = state.replace(cache=cache_rules(state.cache).after_finish(state, state.cache, finished, params))
    work = work.replace(
        iterations=work.iterations + count,
        idle_iterations=jnp.where(stalled, work.idle_iterations + count, work.idle_iterations),
        decodes=work.decodes + tokens,
        context_tokens=work.context_tokens + context * count + batch * (count * (count + 1) // 2),
        busy_time=work.busy_time + duration,
        block_seconds=work.block_seconds + duration * held.astype(duration.dtype),
    )
    return state, work


def jump(
    state: EngineState,
    work: EngineWork,
    until: jax.Array,
    params: EngineParams,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
) -> Jump:
    """The next round of an `advance` with these bounds. Engines that may not run do not change."""
    runs = may_run(state, work, until, params, most_iterations, stall_iterations)
    middle, work_middle, output = run_iteration(state, work, params)
    stalled = total((output.tokens > 0) | output.preempted) == 0
    if state.flight is not None:
        stalled &= state.flight.duration == 0
    if rules(params).ignores:
        stalled &= ~stalled  # all False, but not a constant, which Triton rejects
    run = run_decodes(middle, work_middle, stalled, until, params, most_iterations, stall_iterations)
    after, work_after = jax.tree.map(lambda new, old: jnp.where(runs, new, old), run, (state, work))
    return Jump(runs, state, work, output, middle, work_middle, stalled, after, work_after)


def advance(
    state: EngineState,
    work: EngineWork,
    until: jax.Array,
    params: EngineParams,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
    on_jump: Callable[[Any, Jump], Any] | None = None,
    seen: Any = None,
) -> tuple[EngineState, EngineWork, Any]:
    """Runs, by jumps, every iteration that starts before `until` (float [...], s from the present; rule 9).

    Stops earlier if the queue is empty, if `work` counts `most_iterations`, or after `stall_iterations` consecutive
    empty iterations. Finished requests are marked, not removed. After every round, `seen` (any pytree) is replaced by
    `on_jump(seen, jump)`; its last value is the last result.
    """

    def goes_on(carry: tuple[EngineState, EngineWork, Any]) -> jax.Array:
        return anywhere(may_run(carry[0], carry[1], until, params, most_iterations, stall_iterations))

    def one(carry: tuple[EngineState, EngineWork, Any]) -> tuple[EngineState, EngineWork, Any]:
        state, work, seen = carry
        done = jump(state, work, until, params, most_iterations, stall_iterations)
        return done.after, done.work_after, seen if on_jump is None else on_jump(seen, done)

    return jax.lax.while_loop(goes_on, one, (state, work, seen))


def may_run(
    state: EngineState,
    work: EngineWork,
    until: jax.Array,
    params: EngineParams,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
) -> jax.Array:
    """bool [...]: whether the next iteration is within the bounds (see `advance`)."""
    return (
        (total(rules(params).occupies(state, params)) > 0)
        & (state.clock < until)
        & (work.iterations < most_iterations)
        & (work.idle_iterations < stall_iterations)
    )
