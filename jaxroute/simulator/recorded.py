"""One engine on a recorded list of requests: by jumps, or iteration by iteration with every decision.

Pure functions of arrays: `jax.vmap` runs many engines and lists of one shape. A request's slot is its position in the
list, so there are as many slots as requests and nothing is ever rejected. The command is `jaxroute replay`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.advance import Progress, may_run, run_iteration
from jaxroute.simulator.advance_kernel import advance_engines
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import IGNORED, LARGE, NEVER, EngineParams, EngineState, empty_engine, target_tokens
from jaxroute.simulator.scheduler import Decision
from jaxroute.simulator.slots import append

AFTER_ALL = 1e30
"""s, later than anything: an engine advanced to it drains."""


class Recording(struct.PyTreeNode):
    """R requests in order of arrival; those from the `count`-th on are padding. Times in seconds."""

    gap: jax.Array  # float [R], since the arrival before (the first one: since the start)
    arrival_iteration: jax.Array  # int32 [R], joins before the iteration of this index, where `by_iteration`
    prompt_tokens: jax.Array  # int32 [R]
    output_tokens: jax.Array  # int32 [R]
    count: jax.Array  # int32 []
    by_iteration: jax.Array  # bool [], arrivals are by iteration, not by time
    max_iterations: jax.Array  # int32 []
    stall_iterations: jax.Array  # int32 [], so many empty iterations in a row with no arrival left are a stall


class Outcome(struct.PyTreeNode):
    """What became of the requests. Times are seconds since `arrival`, which counts from the present of the moment:
    with arrivals by time each request's own arrival, so 0; with arrivals by iteration the start of the recording.
    """

    first_token: jax.Array  # float [R], NEVER where no token came
    finish: jax.Array  # float [R], NEVER where it did not finish
    preemptions: jax.Array  # int32 [R]
    emitted: jax.Array  # int32 [R]
    end: jax.Array  # float [], end of the last iteration, since the last request joined (by iteration: since the start)
    joined: jax.Array  # int32 [], requests that arrived before the run ended
    progress: Progress
    stalled: jax.Array  # bool []
    drained: jax.Array  # bool [], the engine is done with every request
    ignored_iteration: jax.Array | None  # int32 [R], when vllm_v0 dropped the request, -1 for the others


class _Run(struct.PyTreeNode):
    state: EngineState
    progress: Progress
    joined: jax.Array  # int32 [], requests so far
    age: jax.Array  # float [R], seconds since a request's arrival; stays 0 with arrivals by iteration
    first_token: jax.Array
    finish: jax.Array
    skipped: jax.Array  # int32 [], iterations that an idle engine passed over to the index of an arrival
    ignored_iteration: jax.Array | None  # int32 [R], as in `Outcome`


def _start(params: EngineParams, recording: Recording) -> _Run:
    slots = recording.gap.shape[0]
    ignored = jnp.full(slots, -1, jnp.int32) if rules(params).ignores else None
    never, zeros = jnp.full(slots, NEVER, float), jnp.zeros(slots, float)
    return _Run(empty_engine(slots), Progress.none(), jnp.int32(0), zeros, never, never, jnp.int32(0), ignored)


def _harvest(run: _Run) -> _Run:
    """Notes the new first tokens and finishes, relative to arrival, before the present moves on."""
    state = run.state
    ignored = run.ignored_iteration
    if ignored is not None:
        now = (state.finish_time == IGNORED) & (ignored < 0)
        ignored = jnp.where(now, state.computed + run.skipped, ignored)
    return run.replace(
        ignored_iteration=ignored,
        first_token=jnp.where(run.first_token == NEVER, state.first_token_time + run.age, run.first_token),
        finish=jnp.where(run.finish == NEVER, state.finish_time + run.age, run.finish),
    )


def _is_due(params: EngineParams, recording: Recording, run: _Run) -> jax.Array:
    """bool []: the next request joins before the next iteration. An idle engine goes to it at once."""
    index = jnp.minimum(run.joined, recording.gap.shape[0] - 1)
    idle = ~jnp.any(rules(params).present(params, run.state))
    reached = jnp.where(
        recording.by_iteration,
        recording.arrival_iteration[index] <= run.progress.iterations + run.skipped,
        recording.gap[index] <= run.state.clock,
    )
    return (run.joined < recording.count) & (idle | reached) & (run.progress.iterations < recording.max_iterations)


def _join(params: EngineParams, recording: Recording, run: _Run) -> _Run:
    """Moves the present to the next arrival, and lets the request join."""
    run = _harvest(run)
    index = run.joined
    gap = jnp.where(recording.by_iteration, 0, recording.gap[index])
    state = run.state.replace(
        clock=run.state.clock - gap,
        first_token_time=run.state.first_token_time - gap,
        finish_time=run.state.finish_time - gap,
    )
    prompt = recording.prompt_tokens[index]
    target = target_tokens(prompt, recording.output_tokens[index], rules(params).longest(params))
    # By iteration, an idle engine moves the index, not the clock.
    at = jnp.where(recording.by_iteration, state.clock, 0)
    to_index = recording.arrival_iteration[index] - run.progress.iterations
    # An engine that is already stuck when the last request joins gets one more iteration to show it.
    idle = jnp.minimum(run.progress.idle_iterations, recording.stall_iterations - 1)
    return run.replace(
        progress=run.progress.replace(idle_iterations=idle),
        state=append(state, jnp.bool_(True), prompt, target, at),
        joined=run.joined + 1,
        age=jnp.where(jnp.arange(run.age.shape[0]) < run.joined, run.age + gap, 0),
        skipped=jnp.where(recording.by_iteration, jnp.maximum(run.skipped, to_index), run.skipped),
    )


def _outcome(params: EngineParams, recording: Recording, run: _Run) -> Outcome:
    run = _harvest(run)
    drained = (run.joined == recording.count) & ~jnp.any(rules(params).present(params, run.state))
    idle_out = run.progress.idle_iterations >= recording.stall_iterations
    return Outcome(
        first_token=run.first_token,
        finish=run.finish,
        preemptions=run.state.preemptions,
        emitted=run.state.generated,
        end=run.state.clock,
        joined=run.joined,
        progress=run.progress,
        stalled=(run.joined == recording.count) & ~drained & idle_out,
        drained=drained,
        ignored_iteration=run.ignored_iteration,
    )


def replay_by_jumps(params: EngineParams, recording: Recording) -> Outcome:
    """Runs the recording from event to event."""

    def to_next_arrival(run: _Run, _: None) -> tuple[_Run, None]:
        index = run.joined
        present = (index < recording.count) & (run.progress.iterations < recording.max_iterations)
        until = jnp.where(recording.by_iteration, AFTER_ALL, recording.gap[index])
        most = jnp.where(recording.by_iteration, recording.arrival_iteration[index] - run.skipped, LARGE)
        most = jnp.minimum(most, recording.max_iterations)
        state, progress = advance_engines(params, run.state, run.progress, jnp.where(present, until, -AFTER_ALL), most)
        run = run.replace(state=state, progress=progress)
        return jax.lax.cond(_is_due(params, recording, run), lambda: _join(params, recording, run), lambda: run), None

    run, _ = jax.lax.scan(to_next_arrival, _start(params, recording), length=recording.gap.shape[0])
    after_all = jnp.asarray(AFTER_ALL, float)
    state, progress = advance_engines(
        params, run.state, run.progress, after_all, recording.max_iterations, recording.stall_iterations
    )
    return _outcome(params, recording, run.replace(state=state, progress=progress))


def replay_by_iterations(
    params: EngineParams, recording: Recording, num_iterations: int
) -> tuple[Outcome, Decision, jax.Array, jax.Array]:
    """Runs at most `num_iterations` (static, M) one by one.

    Returns the outcome; the decisions, stacked [M, ...]; bool [M], whether the iteration took place; int32 [M], the
    number of waiting requests after the decision. The readable way, and the test of the other.
    """

    def step(run: _Run, _: None) -> tuple[_Run, tuple[Decision, jax.Array, jax.Array]]:
        is_due = lambda run: _is_due(params, recording, run)  # noqa: E731
        run = jax.lax.while_loop(is_due, lambda run: _join(params, recording, run), run)
        no_arrival_left = run.joined == recording.count
        stall = jnp.where(no_arrival_left, recording.stall_iterations, LARGE)
        until = jnp.asarray(AFTER_ALL, float)
        runs = may_run(params, run.state, run.progress, until, recording.max_iterations, stall)
        state, progress, decision = run_iteration(params, run.state, run.progress)
        behind = run.state.unfinished() & (run.state.position >= decision.num_running)
        if decision.ignored is not None:
            behind &= ~decision.ignored
        waiting = jnp.sum(behind, dtype=jnp.int32)
        after = run.replace(state=state, progress=progress)
        run = jax.tree.map(lambda new, old: jnp.where(runs, new, old), after, run)
        return run, (decision, runs, waiting)

    run, (decisions, took_place, waiting) = jax.lax.scan(step, _start(params, recording), length=num_iterations)
    return _outcome(params, recording, run), decisions, took_place, waiting
