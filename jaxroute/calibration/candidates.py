"""Simulates many candidate servers on one log at once, each with the exact scheduler.

A server consists of D engines behind vLLM's rule for data-parallel engines; usually D is 1. Candidates are the last
axis, and engines the axis before: arrays of queues are [S, D, K]. Candidates do not wait for each other: each has its
own position in the log.

A queue has few slots, independent of the length of the log. Requests behind the first few of `waiting` do not affect an
iteration, so they remain in a list until a slot is free. This is exact as long as one slot is left for a waiting
request. Otherwise the candidate is marked `overflowed`, and the caller must use more slots.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.advance import EngineWork, jump
from jaxroute.simulator.cluster import collect, join
from jaxroute.simulator.engine import LARGE, NEVER, EngineParams, EngineState, OwnBlocks, empty_engine
from jaxroute.simulator.load_balancing import data_parallel_load


class LogRequests(struct.PyTreeNode):
    """R requests in order of arrival."""

    arrival: jax.Array  # float [R], s; the first is 0
    prompt_tokens: jax.Array  # int32 [R]
    output_tokens: jax.Array  # int32 [R]
    shared_tokens: jax.Array  # int32 [R], tokens of the prompt that a prefix cache could contain


class Candidates(struct.PyTreeNode):
    """K servers; the engines of a server are equal."""

    engine: EngineParams  # each field [K]
    prefix_hits: jax.Array  # float [K], share of `shared_tokens` saved by a prefix cache that the engine does not have


def prompt_left(
    prompt_tokens: jax.Array, shared_tokens: jax.Array, prefix_hits: jax.Array | float, block_size: jax.Array | int
) -> jax.Array:
    """int32 [...]: tokens of a prompt after the whole blocks that a prefix cache contains."""
    blocks = jnp.floor(prefix_hits * shared_tokens / block_size + 1e-4).astype(jnp.int32)
    return jnp.maximum(prompt_tokens - blocks * block_size, 1)


class Simulated(struct.PyTreeNode):
    """Results of the requests under K candidates. Times are in seconds since the beginning of the log."""

    first_token: jax.Array  # float [R, K], NEVER if there was none
    finish: jax.Array  # float [R, K], NEVER if it did not finish
    overflowed: jax.Array  # bool [K], there were too few slots, so the result is not exact
    preemptions: jax.Array  # int32 [K], of the finished requests
    rounds: jax.Array  # int32 [K], rounds of the loop for each candidate
    series: tuple[jax.Array, jax.Array, jax.Array] | None  # [M, D, K]: start of a round, s; then running and waiting


class _Run(struct.PyTreeNode):
    state: EngineState  # [S, D, K], times since the beginning of the log
    work: EngineWork
    number: jax.Array  # int32 [S, D, K], number of the request in the slot
    routed: jax.Array  # int32 [K], number of requests assigned to an engine
    order: jax.Array  # int32 [R, D, K], requests of an engine in order of arrival
    given: jax.Array  # int32 [D, K], number of requests in `order`
    joined: jax.Array  # int32 [D, K], number of these that have entered a slot
    first_token: jax.Array
    finish: jax.Array
    done: jax.Array  # int32 [K], number of finished requests
    preemptions: jax.Array
    failed: jax.Array  # bool [K]: stalled, or past the time limit
    overflowed: jax.Array
    rounds: jax.Array  # int32 [K]
    series: tuple[jax.Array, jax.Array, jax.Array] | None


def _next_arrival(requests: LogRequests, run: _Run) -> jax.Array:
    """The time of the next arrival, float [K]; NEVER after the last one."""
    last = requests.arrival.shape[0] - 1
    return jnp.where(run.routed <= last, requests.arrival[jnp.minimum(run.routed, last)], NEVER)


def _ready(requests: LogRequests, run: _Run) -> jax.Array:
    """bool [K]: whether every engine has reached the next arrival."""
    idle = (run.state.num_requests == 0) & (run.given == run.joined)
    reached = idle | (run.state.clock >= _next_arrival(requests, run))
    return jnp.all(reached, axis=0) & (run.routed < requests.arrival.shape[0]) & ~run.failed


def _route(requests: LogRequests, run: _Run) -> _Run:
    """Assigns the next request of every ready candidate to an engine."""
    ready = _ready(requests, run)
    running = run.state.num_running
    waiting = run.state.num_requests - running + run.given - run.joined
    engine = jnp.argmin(data_parallel_load(waiting, running), axis=0)  # [K]
    count, lanes = requests.arrival.shape[0], jnp.arange(engine.shape[0])
    place = jnp.where(ready, run.given[engine, lanes], count)
    chosen = ready & (jnp.arange(running.shape[0])[:, None] == engine)
    return run.replace(
        order=run.order.at[place, engine, lanes].set(run.routed, mode="drop"),
        given=run.given + chosen,
        routed=run.routed + ready,
    )


def _has_room(run: _Run) -> jax.Array:
    return (run.joined < run.given) & (run.state.num_requests < run.state.num_slots) & ~run.failed


def _join(servers: Candidates, requests: LogRequests, run: _Run) -> _Run:
    """Moves the next request of every engine with a free slot into its queue."""
    joins = _has_room(run)
    number = jnp.take_along_axis(run.order, jnp.minimum(run.joined, run.order.shape[0] - 1)[None], axis=0)[0]
    params, prompt, shared = servers.engine, requests.prompt_tokens[number], requests.shared_tokens[number]
    if not params.enable_prefix_caching:
        prompt = prompt_left(prompt, shared, servers.prefix_hits, params.block_size)
    output, arrival = requests.output_tokens[number], requests.arrival[number]
    here = joins & (run.state.position == run.state.num_requests)
    state, queued = join(run.state, run.number, joins, prompt, output, number, arrival, params)
    if isinstance(state.cache, OwnBlocks):
        # As if they were the request's own, and never evicted before it is admitted for the first time.
        found = jnp.where(here, shared // params.block_size, state.cache.found)
        state = state.replace(cache=OwnBlocks(found, jnp.where(here, LARGE, state.cache.ahead)))
    return run.replace(state=state, number=queued, joined=run.joined + joins)


def _collect(run: _Run, params: EngineParams) -> _Run:
    """Records the finished requests, and frees their slots."""
    state, number, finished = collect(run.state, run.number, params)
    gone, left = finished.engines, finished.served
    lanes = jnp.broadcast_to(jnp.arange(left.shape[-1]), left.shape[1:])

    def note(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, first, finish, done, preemptions = carry
        slot = jnp.min(jnp.where(left, gone.position, LARGE), axis=0)
        here = gone.position == slot

        def value(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(here, values, 0), axis=0, dtype=values.dtype)

        found = slot < LARGE
        row = jnp.where(found, value(finished.payload), first.shape[0])
        first = first.at[row, lanes].set(value(gone.first_token_time), mode="drop")
        finish = finish.at[row, lanes].set(value(gone.finish_time), mode="drop")
        done += jnp.sum(found, axis=0, dtype=jnp.int32)
        preemptions += jnp.sum(value(gone.preemptions), axis=0, dtype=jnp.int32)
        return left & ~here, first, finish, done, preemptions

    carry = left, run.first_token, run.finish, run.done, run.preemptions
    _, first, finish, done, preemptions = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), note, carry)
    return run.replace(state=state, number=number, first_token=first, finish=finish, done=done, preemptions=preemptions)


def _round(servers: Candidates, requests: LogRequests, latest: jax.Array, most_rounds: jax.Array, run: _Run) -> _Run:
    """Arrivals, and then one iteration of every engine with the plain decodes after it."""
    params = servers.engine
    run = jax.lax.while_loop(lambda run: jnp.any(_ready(requests, run)), lambda run: _route(requests, run), run)
    run = jax.lax.while_loop(lambda run: jnp.any(_has_room(run)), lambda run: _join(servers, requests, run), run)
    state = run.state
    more = run.routed < requests.arrival.shape[0]
    # Several engines stop at every arrival, which one of them receives. A single engine continues when it is full.
    goes_on = (state.num_requests == state.num_slots) & (state.clock.shape[0] == 1)
    until = jnp.where(goes_on, NEVER, _next_arrival(requests, run))
    done = jump(state, run.work, jnp.where(run.failed, -NEVER, until), params)
    runs, after = done.runs, done.after
    series = run.series
    if series is not None:
        lanes = jnp.arange(runs.shape[-1])
        num_running = done.output.num_running
        waiting = state.num_requests - num_running + run.given - run.joined
        row = jnp.where(jnp.any(runs, axis=0), run.rounds, series[0].shape[0])
        now = (state.clock, num_running, waiting)
        series = tuple(
            all_.at[row, :, lanes].set(jnp.where(runs, new, -1).T, mode="drop")
            for all_, new in zip(series, now, strict=True)
        )
    full = runs & (done.output.num_running == state.num_slots) & ((run.given > run.joined) | more)
    failed = run.failed | jnp.any((runs & done.stalled) | (after.clock > latest), axis=0) | (run.rounds >= most_rounds)
    run = run.replace(
        state=after,
        work=done.work_after,
        failed=failed,
        overflowed=run.overflowed | jnp.any(full, axis=0),
        rounds=run.rounds + jnp.any(runs, axis=0),
        series=series,
    )
    return _collect(run, params)


@partial(jax.jit, static_argnames=("num_slots", "engines", "num_rounds"))
def simulate(
    servers: Candidates,
    requests: LogRequests,
    latest: jax.Array,
    most_rounds: jax.Array,
    num_slots: int,
    engines: int = 1,
    num_rounds: int = 0,
) -> Simulated:
    """Runs the whole log under K candidates.

    A candidate ends early, with NEVER for the missing times, if it stalls, if its clock passes `latest` (s), or after
    `most_rounds` rounds. `num_slots`, the number of `engines` of a server, and `num_rounds`, the number of rounds whose
    series are kept, are static.
    """
    count, lanes = requests.arrival.shape[0], servers.prefix_hits.shape[0]
    shape = (engines, lanes)
    never = jnp.full((count, lanes), NEVER, float)
    start = _Run(
        state=empty_engine(num_slots, shape, servers.engine),
        work=EngineWork.none(shape),
        number=jnp.zeros((num_slots, *shape), jnp.int32),
        routed=jnp.zeros(lanes, jnp.int32),
        order=jnp.zeros((count, *shape), jnp.int32),
        given=jnp.zeros(shape, jnp.int32),
        joined=jnp.zeros(shape, jnp.int32),
        first_token=never,
        finish=never,
        done=jnp.zeros(lanes, jnp.int32),
        preemptions=jnp.zeros(lanes, jnp.int32),
        failed=jnp.zeros(lanes, bool),
        overflowed=jnp.zeros(lanes, bool),
        rounds=jnp.zeros(lanes, jnp.int32),
        series=None,
    )
    if num_rounds:
        counts = jnp.full((num_rounds, *shape), -1, jnp.int32)
        start = start.replace(series=(jnp.full(counts.shape, -1, float), counts, counts))

    def goes_on(run: _Run) -> jax.Array:
        return jnp.any((run.done < count) & ~run.failed)

    run = jax.lax.while_loop(goes_on, lambda run: _round(servers, requests, latest, most_rounds, run), start)
    return Simulated(run.first_token, run.finish, run.overflowed, run.preemptions, run.rounds, run.series)
