"""Runs one engine on a recorded list of requests: by jumps, or iteration by iteration with every decision.

The functions are pure: `jax.vmap` runs many engines and lists of one shape. A request's slot is its position in the
list, so there are as many slots as requests, and none is ever rejected. The command is `jaxroute replay`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.advance import EngineWork, jump
from jaxroute.simulator.cluster import AFTER_ALL, join, run_until, shift_time
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import IGNORED, LARGE, NEVER, EngineParams, EngineState, empty_engine, total
from jaxroute.simulator.scheduler import SchedulerOutput
from jaxroute.workload.request import Prefix


class Recording(struct.PyTreeNode):
    """R requests in order of arrival; requests from index `count` on are padding. Times are in seconds."""

    gap: jax.Array  # float [R], since the previous arrival; for the first one since the start
    arrival_iteration: jax.Array  # int32 [R], with `by_iteration`: joins before the iteration of this index
    prompt_tokens: jax.Array  # int32 [R]
    output_tokens: jax.Array  # int32 [R]
    stop_token: jax.Array  # bool [R], the request ends by a stop token: its end is not known ahead
    count: jax.Array  # int32 []
    by_iteration: jax.Array  # bool [], whether arrivals are given by iteration instead of time
    max_iterations: jax.Array  # int32 []
    stall_iterations: jax.Array  # int32 [], this many consecutive empty iterations after the last arrival: a stall
    prefix: Prefix | None = None  # [R, K], what each request shares with others, if the engine has `prefix_pieces`


class ReplayOutcome(struct.PyTreeNode):
    """Results per request. Times are in seconds; with arrivals by time they count from the arrival of the request,
    and with arrivals by iteration from the start of the recording.
    """

    first_token: jax.Array  # float [R], NEVER if it has no token
    finish: jax.Array  # float [R], NEVER if it did not finish
    preemptions: jax.Array  # int32 [R]
    emitted: jax.Array  # int32 [R]
    end: jax.Array  # float [], end of the last iteration since the last arrival (by iteration: since the start)
    joined: jax.Array  # int32 [], requests that arrived before the run ended
    work: EngineWork
    stalled: jax.Array  # bool []
    drained: jax.Array  # bool [], the engine has finished every request
    ignored_iteration: jax.Array  # int32 [R], iteration in which vllm_v0 dropped the request, else -1


class _Run(struct.PyTreeNode):
    state: EngineState
    work: EngineWork
    joined: jax.Array  # int32 [], requests that have arrived
    age: jax.Array  # float [R], seconds since the request's arrival; 0 with arrivals by iteration
    first_token: jax.Array
    finish: jax.Array
    skipped: jax.Array  # int32 [], iterations that an idle engine skipped to the index of an arrival
    ignored_iteration: jax.Array


def _start(recording: Recording, params: EngineParams) -> _Run:
    slots = recording.gap.shape[0]
    never, zeros = jnp.full(slots, NEVER, float), jnp.zeros(slots, float)
    ignored = jnp.full(slots, -1, jnp.int32)
    engine = empty_engine(slots, params=params)
    return _Run(engine, EngineWork.none(), jnp.int32(0), zeros, never, never, jnp.int32(0), ignored)


def _note_times(run: _Run) -> _Run:
    """Stores the times of new first tokens and finishes relative to the arrival, before the origin of times moves."""
    state = run.state
    ignored = (state.finish_time == IGNORED) & (run.ignored_iteration < 0)
    return run.replace(
        ignored_iteration=jnp.where(ignored, state.computed + run.skipped, run.ignored_iteration),
        first_token=jnp.where(run.first_token == NEVER, state.first_token_time + run.age, run.first_token),
        finish=jnp.where(run.finish == NEVER, state.finish_time + run.age, run.finish),
    )


def _is_due(recording: Recording, run: _Run, params: EngineParams) -> jax.Array:
    """bool []: the next request joins before the next iteration. An idle engine advances to it at once."""
    index = jnp.minimum(run.joined, recording.gap.shape[0] - 1)
    idle = ~jnp.any(rules(params).occupies(run.state, params))
    reached = jnp.where(
        recording.by_iteration,
        recording.arrival_iteration[index] <= run.work.iterations + run.skipped,
        recording.gap[index] <= run.state.clock,
    )
    return (run.joined < recording.count) & (idle | reached) & (run.work.iterations < recording.max_iterations)


def _join(recording: Recording, run: _Run, params: EngineParams) -> _Run:
    """Moves the origin of times to the next arrival, and adds the request to the queue."""
    run = _note_times(run)
    index = run.joined
    gap = jnp.where(recording.by_iteration, 0, recording.gap[index])
    state = shift_time(run.state, gap, params)
    # With arrivals by iteration, an idle engine advances the index, not the clock.
    at = jnp.where(recording.by_iteration, state.clock, 0)
    to_index = recording.arrival_iteration[index] - run.work.iterations
    if state.flight is not None:  # an engine that is idle until then ends its last batch first
        at += jnp.where(recording.by_iteration & (to_index > run.skipped), state.flight.duration, 0)
    prompt, output = recording.prompt_tokens[index], recording.output_tokens[index]
    stop_token, prefix = recording.stop_token[index], jax.tree.map(lambda leaf: leaf[index], recording.prefix)
    state, _ = join(state, (), jnp.bool_(True), prompt, output, (), at, params, stop_token, prefix)
    # An engine that is already stalled when the last request joins runs one more iteration, which shows the stall.
    idle = jnp.minimum(run.work.idle_iterations, recording.stall_iterations - 1)
    return run.replace(
        work=run.work.replace(idle_iterations=idle),
        state=state,
        joined=run.joined + 1,
        age=jnp.where(jnp.arange(run.age.shape[0]) < run.joined, run.age + gap, 0),
        skipped=jnp.where(recording.by_iteration, jnp.maximum(run.skipped, to_index), run.skipped),
    )


def _outcome(recording: Recording, run: _Run, params: EngineParams) -> ReplayOutcome:
    run = _note_times(run)
    drained = (run.joined == recording.count) & ~jnp.any(rules(params).occupies(run.state, params))
    idle_out = run.work.idle_iterations >= recording.stall_iterations
    return ReplayOutcome(
        first_token=run.first_token,
        finish=run.finish,
        preemptions=run.state.preemptions,
        emitted=run.state.generated,
        end=run.state.clock,
        joined=run.joined,
        work=run.work,
        stalled=(run.joined == recording.count) & ~drained & idle_out,
        drained=drained,
        ignored_iteration=run.ignored_iteration,
    )


def replay_by_jumps(recording: Recording, params: EngineParams) -> ReplayOutcome:
    """Runs the recording from event to event."""

    def to_next_arrival(run: _Run, _: None) -> tuple[_Run, None]:
        index = run.joined
        arrives = (index < recording.count) & (run.work.iterations < recording.max_iterations)
        until = jnp.where(recording.by_iteration, AFTER_ALL, recording.gap[index])
        most = jnp.where(recording.by_iteration, recording.arrival_iteration[index] - run.skipped, LARGE)
        most = jnp.minimum(most, recording.max_iterations)
        until = jnp.where(arrives, until, -AFTER_ALL)
        state, work, _ = run_until(run.state, until, params, run.work, most)
        run = run.replace(state=state, work=work)
        return jax.lax.cond(_is_due(recording, run, params), lambda: _join(recording, run, params), lambda: run), None

    run, _ = jax.lax.scan(to_next_arrival, _start(recording, params), length=recording.gap.shape[0])
    after_all = jnp.asarray(AFTER_ALL, float)
    state, work, _ = run_until(
        run.state, after_all, params, run.work, recording.max_iterations, recording.stall_iterations
    )
    return _outcome(recording, run.replace(state=state, work=work), params)


def replay_by_iterations(
    recording: Recording, params: EngineParams, num_iterations: int
) -> tuple[ReplayOutcome, SchedulerOutput, jax.Array, jax.Array]:
    """Runs at most `num_iterations` (static, M) iterations one by one; the tests compare `replay_by_jumps` with it.

    Returns the outcome; the decisions of the scheduler, stacked [M, ...]; bool [M], whether the iteration took place;
    int32 [M], the number of waiting requests after the decision.
    """

    def step(run: _Run, _: None) -> tuple[_Run, tuple[SchedulerOutput, jax.Array, jax.Array]]:
        is_due = lambda run: _is_due(recording, run, params)  # noqa: E731
        run = jax.lax.while_loop(is_due, lambda run: _join(recording, run, params), run)
        stall = jnp.where(run.joined == recording.count, recording.stall_iterations, LARGE)
        # The limit is this iteration, so that no run of decodes follows it.
        most = jnp.minimum(recording.max_iterations, run.work.iterations + 1)
        done = jump(run.state, run.work, jnp.asarray(AFTER_ALL, float), params, most, stall)
        # With asynchronous scheduling, a request may have its last token delivered while it waits (rule C7).
        before = done.middle if run.state.flight is None else done.before
        waiting = total(before.unfinished() & (before.position >= done.output.num_running))
        return run.replace(state=done.after, work=done.work_after), (done.output, done.runs, waiting)

    run, (outputs, took_place, waiting) = jax.lax.scan(step, _start(recording, params), length=num_iterations)
    return _outcome(recording, run, params), outputs, took_place, waiting
