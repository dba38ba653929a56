"""Runs an engine: one iteration at a time, or by jumps from event to event. Both give the same schedule.

Between two events the batch is constant and every running request gains one token an iteration, so a run of decode
iterations has a closed form (latency.py). A jump takes one scheduled iteration, whatever it is, and after it as many
plain decode iterations as end at the next event: the instant to stop at, a completion, or a KV block that cannot be
had.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator import scheduler_v0
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import LARGE, EngineParams, EngineState, anywhere, lowest, total
from jaxroute.simulator.latency import decode_run, iteration_time, iterations_started_before, run_time
from jaxroute.simulator.scheduler import Decision


class Progress(struct.PyTreeNode):
    """What engines did while they were advanced. Counts are int32 [...], times float [...] in seconds."""

    iterations: jax.Array
    idle_iterations: jax.Array  # iterations in a row, up to now, that scheduled nothing (a stall, when they do not end)
    prefill_tokens: jax.Array  # sum of np
    decodes: jax.Array  # sum of nd
    context_tokens: jax.Array  # sum of ctx
    busy_time: jax.Array  # sum of the durations of iterations
    block_seconds: jax.Array  # KV blocks held, integrated over busy time (in a run of decodes: growing linearly)

    @classmethod
    def none(cls, shape: tuple[int, ...] = ()) -> Progress:
        """Nothing done yet, by engines of these trailing axes."""
        count, time = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, float)
        return cls(count, count, count, count, count, time, time)


def run_iteration(
    params: EngineParams, state: EngineState, progress: Progress
) -> tuple[EngineState, Progress, Decision]:
    """Schedules and executes one iteration, whose tokens appear at its end."""
    decision = rules(params).schedule(params, state)
    duration = iteration_time(
        params.latency, decision.prefill_tokens, decision.decodes, decision.context_tokens.astype(state.clock.dtype)
    )
    clock = state.clock + duration
    # 6: a request whose computed tokens reach its length yields a token; 3: a preempted one starts again from nothing.
    computed = jnp.where(state.position < decision.num_running, state.computed + decision.tokens, 0)
    sampled = (decision.tokens > 0) & (computed >= state.prompt_tokens + state.generated)
    if decision.ignored is not None:
        sampled &= state.unfinished()  # what is decoded once more yields nothing
    generated = state.generated + sampled
    nothing = decision.prefill_tokens + decision.decodes == 0
    after = state.replace(
        clock=clock,
        num_running=decision.num_running,
        computed=computed,
        generated=generated,
        preemptions=state.preemptions + decision.preempted,
        first_token_time=jnp.where(sampled & (state.generated == 0), clock, state.first_token_time),
        finish_time=jnp.where(sampled & (generated >= state.target_tokens), clock, state.finish_time),
    )
    if decision.ignored is not None:
        after = scheduler_v0.settle(params, state, after, decision.ignored, progress.iterations)
    progress = Progress(
        iterations=progress.iterations + 1,
        idle_iterations=jnp.where(nothing, progress.idle_iterations + 1, 0),
        prefill_tokens=progress.prefill_tokens + decision.prefill_tokens,
        decodes=progress.decodes + decision.decodes,
        context_tokens=progress.context_tokens + decision.context_tokens,
        busy_time=progress.busy_time + duration,
        block_seconds=progress.block_seconds + duration * decision.used_blocks,
    )
    return after, progress, decision


def _iterations_until_full(
    params: EngineParams,
    blocks_after: Callable[[jax.Array], jax.Array],
    usable: jax.Array,
    batch: jax.Array,
    context: jax.Array,
    enough: jax.Array,
) -> jax.Array:
    """Decode iterations for which `usable` KV blocks are enough, int32 [...]; any number from `enough` on means enough.

    Rounding every request's last block up or down bounds the answer within `block_size - 1`, and bisection finds it.
    The loop runs only where memory is that short.
    """
    batch = jnp.maximum(batch, 1)
    spare = usable * params.block_size - context
    low = (spare - batch * (params.block_size - 1)) // batch

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
    params: EngineParams,
    state: EngineState,
    progress: Progress,
    stalled: jax.Array,
    until: jax.Array,
    most_iterations: jax.Array | int,
    stall_iterations: jax.Array | int,
) -> tuple[EngineState, Progress]:
    """Runs the plain iterations that follow, up to the next event; none where the next iteration is something else.

    `stalled`, bool [...]: the last iteration changed nothing, so that it repeats until something arrives.
    """
    own = rules(params)
    running = state.unfinished() & (state.position < state.num_running) & ~stalled
    batch = total(running)
    context = total(jnp.where(running, state.computed, 0))

    def blocks_after(iterations: jax.Array | int) -> jax.Array:
        return total(jnp.where(running, own.held_blocks(params, state.computed + iterations), 0))

    plain = own.only_decodes(params, state, running, batch, blocks_after)
    to_completion = lowest(jnp.where(running, state.target_tokens - state.generated, LARGE))
    to_stall = stall_iterations - progress.idle_iterations
    gap = until - state.clock
    first, growth = decode_run(params.latency, batch, context.astype(state.clock.dtype))
    count = jnp.minimum(
        jnp.minimum(jnp.where(stalled, to_stall, to_completion), most_iterations - progress.iterations),
        iterations_started_before(first, growth, jnp.maximum(gap, 0)),
    )
    count = jnp.where((plain | stalled) & (gap > 0), count, 0)
    usable = params.usable_blocks - own.spare_blocks if own.spare_blocks else params.usable_blocks
    to_full = _iterations_until_full(params, blocks_after, usable, batch, context, jnp.where(stalled, 0, count))
    count = jnp.where(stalled, count, jnp.minimum(count, to_full))
    count = jnp.maximum(count, 0)

    duration = run_time(first, growth, count)
    clock = state.clock + duration
    added = jnp.where(running, count, 0)
    generated = state.generated + added
    finished = (added > 0) & (generated >= state.target_tokens)
    tokens = batch * count
    held = blocks_after(0) + (0.5 * tokens / params.block_size if own.grows else 0)
    state = state.replace(
        clock=clock,
        computed=state.computed + added,
        generated=generated,
        finish_time=jnp.where(finished, clock, state.finish_time),
    )
    progress = progress.replace(
        iterations=progress.iterations + count,
        idle_iterations=jnp.where(stalled, progress.idle_iterations + count, progress.idle_iterations),
        decodes=progress.decodes + tokens,
        context_tokens=progress.context_tokens + context * count + batch * (count * (count + 1) // 2),
        busy_time=progress.busy_time + duration,
        block_seconds=progress.block_seconds + duration * held.astype(duration.dtype),
    )
    return state, progress


def advance(
    params: EngineParams,
    state: EngineState,
    progress: Progress,
    until: jax.Array,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
) -> tuple[EngineState, Progress]:
    """Runs engines by jumps: every iteration that starts before `until` (float [...], s from the present; rule 9).

    Ends sooner when the queue is empty, when `progress` counts `most_iterations`, or `stall_iterations` empty ones in a
    row. Requests that finish are marked, not removed.
    """

    def goes_on(carry: tuple[EngineState, Progress]) -> jax.Array:
        return may_run(params, carry[0], carry[1], until, most_iterations, stall_iterations)

    def jump(carry: tuple[EngineState, Progress]) -> tuple[EngineState, Progress]:
        state, progress, decision = run_iteration(params, *carry)
        stalled = total((decision.tokens > 0) | decision.preempted) == 0
        if rules(params).ignores:
            stalled &= ~stalled  # all False, but not a constant, which Triton does not take
        jumped = run_decodes(params, state, progress, stalled, until, most_iterations, stall_iterations)
        runs = goes_on(carry)
        return jax.tree.map(lambda new, old: jnp.where(runs, new, old), jumped, carry)

    return jax.lax.while_loop(lambda carry: anywhere(goes_on(carry)), jump, (state, progress))


def may_run(
    params: EngineParams,
    state: EngineState,
    progress: Progress,
    until: jax.Array,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
) -> jax.Array:
    """bool [...]: the next iteration belongs to an advance with these bounds (see `advance`)."""
    return (
        (total(rules(params).present(params, state)) > 0)
        & (state.clock < until)
        & (progress.iterations < most_iterations)
        & (progress.idle_iterations < stall_iterations)
    )
