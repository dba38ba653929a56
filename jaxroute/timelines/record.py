"""The programs of a timeline: one records the decisions of an episode, the other runs its engines again on them and
records every jump.

Both run the cluster with the functions of `simulator.cluster`, so the times are those of the environment.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import follow_episodes
from jaxroute.routers.choice import Router
from jaxroute.simulator.advance import EngineWork, Jump, jump
from jaxroute.simulator.cluster import AFTER_ALL, collect, route, run_until, shift_time
from jaxroute.simulator.disciplines import rules, used_blocks
from jaxroute.simulator.engine import NEVER, EngineParams, EngineState, SharedBlocks, empty_engine, total
from jaxroute.simulator.latency import decode_run
from jaxroute.workload.request import Request


class Routed(struct.PyTreeNode):
    """T decisions, every field [T, ...]."""

    request: Request
    action: jax.Array  # int32
    gap: jax.Array  # float, s to the next arrival


class _Carried(struct.PyTreeNode):
    """The payload of a request's slot; every field [S, N], times in s relative to the current decision."""

    index: jax.Array  # int32, number of the request
    arrival: jax.Array
    admitted: jax.Array


Array = Any  # of NumPy in an episode, of JAX in the log of jumps


class Pieces(NamedTuple):
    """Iterations of engines. In an episode, every field is a NumPy array [P], ordered by expert and time; in the log
    of jumps, times are relative to the decision.

    A piece is one iteration, or a run of `iterations` decodes of one batch. Iteration j of a run takes first + growth *
    j seconds with a context of context + decodes * j tokens. A piece of a live server, whose iterations are not seen,
    has `iterations` 0, and in `decodes` and `running` the requests whose tokens come.
    """

    expert: Array
    start: Array  # float64, s since the episode's beginning, as is the next
    end: Array
    iterations: Array
    prefill_tokens: Array  # np of each iteration
    decodes: Array  # nd of each iteration
    context: Array  # ctx of the first iteration
    first: Array  # s
    growth: Array  # s
    blocks: Array  # KV blocks held in the first iteration
    last_blocks: Array  # KV blocks held in the last iteration
    running: Array  # number of running requests; the next: of waiting requests
    waiting: Array
    preempted: Array  # number of requests preempted at its start


class JumpRow(struct.PyTreeNode):
    """One iteration of each engine and the run of decodes after it; every field [N]."""

    took_place: jax.Array  # bool
    index: jax.Array  # int32, of the decision before it; T: after the last decision
    iteration: Pieces
    run: Pieces  # of no iterations if none came after it


class Log(struct.PyTreeNode):
    """Jumps in order; jumps beyond the last row are not written."""

    jumps: JumpRow  # fields [rows, N]
    count: jax.Array  # int32 []


class Results(struct.PyTreeNode):
    """Results per request; times in s."""

    latency: jax.Array  # float [T], finish - arrival; NaN if not served
    first_token: jax.Array  # float [T], first token - arrival
    admitted: jax.Array  # float [T], admission - arrival
    tokens: jax.Array  # int32 [T], generated
    preemptions: jax.Array  # int32 [T]
    met: jax.Array  # bool [T]


@partial(jax.jit, static_argnums=0)
def run_episode(
    env: RoutingEnvironment, policies: list[Router], which: jax.Array, key: jax.Array, params: EnvParams
) -> tuple[Routed, dict[str, jax.Array]]:
    """The decisions and metrics of the episode of `key` (`evaluation.episodes`) under policy `which` (int32 [])."""
    metrics, routed = follow_episodes(env, policies, which, key[None], params, note=Routed)
    return jax.tree.map(lambda leaf: leaf[:, 0], routed), jax.tree.map(lambda leaf: leaf[0], metrics)


def replay(env: RoutingEnvironment, routed: Routed, params: EnvParams) -> tuple[Log, Results]:
    """`_replay` with as many rows as necessary."""
    rows = 6 * env.episode_length + 256
    log, results = _replay(env, rows, routed, params)
    if log.count > rows:
        log, results = _replay(env, int(log.count), routed, params)
    return log, results


@partial(jax.jit, static_argnums=(0, 1))
def _replay(env: RoutingEnvironment, rows: int, routed: Routed, params: EnvParams) -> tuple[Log, Results]:
    """Runs the engines on the decisions; records at most `rows` jumps and the results of the requests."""
    shape, length = (env.slots, env.num_experts), env.episode_length
    never, floats, none = jnp.full(length, jnp.nan, float), jnp.zeros(shape, float), jnp.zeros(length, jnp.int32)
    engines = empty_engine(env.slots, (env.num_experts,), params.engines)
    results = Results(never, never, never, none, none, none > 0)
    carried = _Carried(jnp.zeros(shape, jnp.int32), floats, floats)

    def step(carry: Any, inputs: tuple[Routed, jax.Array]) -> tuple[Any, None]:
        engines, carried, log, results = carry
        decision, index = inputs
        now = params.at(index)
        own = _Carried(index, 0.0, NEVER)  # pyright: ignore[reportArgumentType]
        request, chosen = decision.request, jnp.arange(env.num_experts) == decision.action
        lengths = request.prompt_tokens, request.output_tokens
        engines, carried, _ = route(engines, carried, chosen, *lengths, own, now.engines, request.prefix)
        engines, carried, log, results = _run(engines, carried, log, results, decision.gap, index, now)
        engines = shift_time(engines, decision.gap, now.engines)
        carried = carried.replace(arrival=carried.arrival - decision.gap, admitted=carried.admitted - decision.gap)
        return (engines, carried, log, results), None

    carry = (engines, carried, _empty_log(engines, rows, params), results)
    (engines, carried, log, results), _ = jax.lax.scan(step, carry, (routed, jnp.arange(length)))
    # The open requests run to their end.
    end = jnp.int32(length)
    *_, log, results = _run(engines, carried, log, results, jnp.asarray(AFTER_ALL, float), end, params.at(end))
    return log, results


def _empty_log(engines: EngineState, rows: int, params: EnvParams) -> Log:
    def first_row(engines: EngineState) -> JumpRow:
        none = EngineWork.none(engines.clock.shape)
        return _row(jump(engines, none, jnp.zeros((), float), params.engines), jnp.int32(0), params.engines)

    shapes = jax.eval_shape(first_row, engines)
    return Log(jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), shapes), jnp.int32(0))


def _run(
    engines: EngineState,
    carried: _Carried,
    log: Log,
    results: Results,
    until: jax.Array,
    index: jax.Array,
    params: EnvParams,
) -> tuple[EngineState, _Carried, Log, Results]:
    """Runs the engines; records each jump as a row, and records and removes the finished requests."""

    def note(seen: tuple[jax.Array, Log], done: Jump) -> tuple[jax.Array, Log]:
        admitted, log = seen
        put = lambda rows, row: rows.at[log.count].set(row, mode="drop")  # noqa: E731
        log = Log(jax.tree.map(put, log.jumps, _row(done, index, params.engines)), log.count + 1)
        starts = done.runs & (done.output.tokens > 0) & (admitted == NEVER)
        return jnp.where(starts, done.before.next_start, admitted), log

    engines, _, (admitted, log) = run_until(engines, until, params.engines, on_jump=note, seen=(carried.admitted, log))
    engines, carried, finished = collect(engines, carried.replace(admitted=admitted), params.engines)
    state, left = finished.engines, finished.payload
    at = jnp.where(finished.served, left.index, results.tokens.shape[0])
    latency = state.finish_time - left.arrival
    new = Results(
        latency=latency,
        first_token=state.first_token_time - left.arrival,
        admitted=left.admitted - left.arrival,
        tokens=state.generated,
        preemptions=state.preemptions,
        met=params.qos_rule.met(state.first_token_time - left.arrival, latency, jnp.maximum(state.generated, 1)),
    )
    return engines, carried, log, jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), results, new)


def _row(done: Jump, index: jax.Array, params: EngineParams) -> JumpRow:
    """The row of a jump after the decision `index`."""
    middle, after, output = done.middle, done.after, done.output
    unfinished, runs = middle.unfinished(), middle.position < middle.num_running
    decoding = unfinished & runs
    batch, context = total(decoding), total(jnp.where(decoding, middle.computed, 0))
    first, growth = decode_run(params.latency, batch, context.astype(middle.clock.dtype))
    held = lambda tokens: total(jnp.where(decoding, rules(params).held_blocks(tokens, params), 0))  # noqa: E731
    # What several requests hold is there once, and decodes take blocks of their own.
    shared = held(middle.computed) - used_blocks(middle, params) if isinstance(middle.cache, SharedBlocks) else 0
    iteration = Pieces(
        expert=jnp.arange(len(batch)),
        start=done.before.next_start,
        end=middle.next_start,
        iterations=jnp.ones_like(batch),
        prefill_tokens=output.prefill_tokens,
        decodes=output.decodes,
        context=output.context_tokens,
        first=middle.next_start - done.before.next_start,
        growth=jnp.zeros_like(growth),
        blocks=output.used_blocks,
        last_blocks=output.used_blocks,
        running=total(done.before.unfinished() & runs),
        waiting=total(unfinished & ~runs),
        preempted=total(output.preempted),
    )
    run = iteration._replace(
        start=middle.next_start,
        end=after.next_start,
        iterations=done.work_after.iterations - done.work_middle.iterations,
        prefill_tokens=jnp.zeros_like(batch),
        decodes=batch,
        context=context + batch,
        first=first,
        growth=growth,
        blocks=held(middle.computed + 1) - shared,
        last_blocks=held(after.computed) - shared,
        running=batch,
        preempted=jnp.zeros_like(batch),
    )
    return JumpRow(done.runs, jnp.full_like(batch, index), iteration, run)
