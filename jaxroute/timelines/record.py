"""The programs behind a timeline: an episode's decisions, and its engines run again on them with every jump noted.

The second follows `environment.transition` to the letter, so that its times are those that the environment counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.metrics import summarize
from jaxroute.environment.state import EnvParams
from jaxroute.routers.choice import Router
from jaxroute.simulator.advance import Progress, may_run, run_decodes, run_iteration
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import (
    IGNORED,
    LARGE,
    NEVER,
    EngineState,
    empty_engine,
    slot_positions,
    target_tokens,
    total,
)
from jaxroute.simulator.latency import decode_run
from jaxroute.simulator.recorded import AFTER_ALL
from jaxroute.simulator.slots import append, finished, remove
from jaxroute.workload.request import Request


class Routed(struct.PyTreeNode):
    """T decisions, every field [T, ...]."""

    request: Request
    action: jax.Array  # int32
    gap: jax.Array  # float, s to the next arrival


class _Carried(struct.PyTreeNode):
    """What moves with a request's slot; every field [S, N], times in s relative to the present."""

    index: jax.Array  # int32, the request's number
    arrival: jax.Array
    admitted: jax.Array


class Jump(struct.PyTreeNode):
    """One iteration of each engine, and the run of decodes after it; every field [N], times relative to the present."""

    took_place: jax.Array  # bool
    index: jax.Array  # int32, of the decision that it follows; T: the drain
    start: jax.Array  # float, s, as are the next two
    middle: jax.Array
    end: jax.Array
    prefill_tokens: jax.Array  # int32, of the iteration, as are the next six
    decodes: jax.Array
    context: jax.Array
    blocks: jax.Array
    running: jax.Array
    waiting: jax.Array
    preempted: jax.Array
    run: jax.Array  # int32, iterations of the run of decodes
    run_decodes: jax.Array  # int32, nd of each of them
    run_context: jax.Array  # int32, ctx of the first of them
    run_first: jax.Array  # float, s it takes
    run_growth: jax.Array  # float, s more that each takes than the one before
    run_blocks: jax.Array  # int32, in the first of them
    run_last_blocks: jax.Array  # int32, in the last


class Log(struct.PyTreeNode):
    """Jumps in order; what does not fit is not written."""

    jumps: Jump  # fields [rows, N]
    count: jax.Array  # int32 []


class Results(struct.PyTreeNode):
    """By request; times in s."""

    latency: jax.Array  # float [T], finish less arrival; NaN where not served
    first_token: jax.Array  # float [T], less arrival
    admitted: jax.Array  # float [T], less arrival
    tokens: jax.Array  # int32 [T], generated
    preemptions: jax.Array  # int32 [T]
    met: jax.Array  # bool [T]


@partial(jax.jit, static_argnums=0)
def run_episode(
    env: RoutingEnvironment, policies: list[Router], which: jax.Array, params: EnvParams, key: jax.Array
) -> tuple[Routed, dict[str, jax.Array]]:
    """The decisions of an episode under policy `which` (int32 []), with the keys of `evaluation.run_episodes`, and its
    metrics.
    """
    env_key, router_key = jax.random.split(key)

    def step(carry: Any, index: jax.Array) -> tuple[Any, Routed]:
        observation, state = carry
        action = jax.lax.switch(which, policies, observation, state, params, jax.random.fold_in(router_key, index))
        request, step_key = state.request, jax.random.fold_in(env_key, index)
        observation, state, _, _, _, info = env.step(step_key, state, action, params)
        return (observation, state), Routed(request, action, info["elapsed"])

    start = env.reset(jax.random.fold_in(env_key, env.episode_length), params)
    (_, state), routed = jax.lax.scan(step, start, jnp.arange(env.episode_length))
    return routed, summarize(state.totals, env.metrics)


def replay(env: RoutingEnvironment, params: EnvParams, routed: Routed) -> tuple[Log, Results]:
    """As `_replay`, with as many rows as it takes."""
    rows = 6 * env.episode_length + 256
    log, results = _replay(env, rows, params, routed)
    if log.count > rows:
        log, results = _replay(env, int(log.count), params, routed)
    return log, results


@partial(jax.jit, static_argnums=(0, 1))
def _replay(env: RoutingEnvironment, rows: int, params: EnvParams, routed: Routed) -> tuple[Log, Results]:
    """Runs the engines on the decisions, and notes at most `rows` jumps and what became of the requests."""
    shape, length = (env.slots, env.num_experts), env.episode_length
    never, floats, none = jnp.full(length, jnp.nan, float), jnp.zeros(shape, float), jnp.zeros(length, jnp.int32)
    state = empty_engine(env.slots, (env.num_experts,))
    nothing: Any = jax.eval_shape(
        lambda: _jump(params, state, Progress.none(state.clock.shape), floats[0, 0], none[0])[1]
    )
    log = Log(jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), nothing), jnp.int32(0))
    results = Results(never, never, never, none, none, none > 0)
    carried = _Carried(jnp.zeros(shape, jnp.int32), floats, floats)

    def step(carry: Any, inputs: tuple[Routed, jax.Array]) -> tuple[Any, None]:
        state, carried, log, results = carry
        decision, index = inputs
        state, carried = _route(env, params, state, carried, decision, index)
        state, carried, log = _run(params, state, carried, log, decision.gap, index)
        state, carried, results = _harvest(params, state, carried, results)
        return (*_at_next_arrival(params, decision.gap, state, carried), log, results), None

    carry = (state, carried, log, results)
    (state, carried, log, results), _ = jax.lax.scan(step, carry, (routed, jnp.arange(length)))
    # The requests still open run to their end.
    state, carried, log = _run(params, state, carried, log, jnp.asarray(AFTER_ALL, float), jnp.int32(length))
    return log, _harvest(params, state, carried, results)[2]


def _route(
    env: RoutingEnvironment, params: EnvParams, state: EngineState, carried: _Carried, decision: Routed, index: Any
) -> tuple[EngineState, _Carried]:
    """As the environment routes."""
    engines, request = params.engines, decision.request
    joins = (jnp.arange(env.num_experts) == decision.action) & (state.num_requests < env.slots)
    joins &= rules(engines).can_serve(engines, request.prompt_tokens, request.output_tokens)
    target = target_tokens(request.prompt_tokens, request.output_tokens, rules(engines).longest(engines))
    here = joins & (slot_positions(carried.index) == state.num_requests)
    carried = _Carried(
        index=jnp.where(here, index, carried.index),
        arrival=jnp.where(here, 0.0, carried.arrival),
        admitted=jnp.where(here, NEVER, carried.admitted),
    )
    return append(state, joins, request.prompt_tokens, target, jnp.zeros((), float)), carried


def _run(
    params: EnvParams, state: EngineState, carried: _Carried, log: Log, until: jax.Array, index: jax.Array
) -> tuple[EngineState, _Carried, Log]:
    """As `advance.advance` with these bounds, and each jump becomes a row."""

    def goes_on(carry: Any) -> jax.Array:
        return jnp.any(may_run(params.engines, carry[0], carry[1], until))

    def jump(carry: Any) -> Any:
        state, progress, admitted, log = carry
        after, row, scheduled = _jump(params, state, progress, until, index)
        put = lambda rows, row: rows.at[log.count].set(row, mode="drop")  # noqa: E731
        log = Log(jax.tree.map(put, log.jumps, row), log.count + 1)
        admitted = jnp.where(row.took_place & scheduled & (admitted == NEVER), state.clock, admitted)
        state, progress = jax.tree.map(lambda a, b: jnp.where(row.took_place, a, b), after, (state, progress))
        return state, progress, admitted, log

    carry = (state, Progress.none(state.clock.shape), carried.admitted, log)
    state, _, admitted, log = jax.lax.while_loop(goes_on, jump, carry)
    return state, carried.replace(admitted=admitted), log


def _jump(
    params: EnvParams, state: EngineState, before: Progress, until: jax.Array, index: jax.Array
) -> tuple[tuple[EngineState, Progress], Jump, jax.Array]:
    """One jump of `advance.advance`: what is after it; its row; bool [S, N], who was scheduled."""
    engines, own = params.engines, rules(params.engines)
    middle, progress, decision = run_iteration(engines, state, before)
    stalled = (total((decision.tokens > 0) | decision.preempted) == 0) & (not own.ignores)
    unfinished, runs = middle.unfinished(), middle.position < middle.num_running
    after, after_progress = run_decodes(engines, middle, progress, stalled, until, LARGE, LARGE)

    decoding = unfinished & runs
    batch, context = total(decoding), total(jnp.where(decoding, middle.computed, 0))
    first, growth = decode_run(engines.latency, batch, context.astype(state.clock.dtype))
    blocks = lambda tokens: total(jnp.where(decoding, own.held_blocks(engines, tokens), 0))  # noqa: E731
    row = Jump(
        took_place=may_run(engines, state, before, until),
        index=jnp.full_like(batch, index),
        start=state.clock,
        middle=middle.clock,
        end=after.clock,
        prefill_tokens=decision.prefill_tokens,
        decodes=decision.decodes,
        context=decision.context_tokens,
        blocks=decision.used_blocks,
        running=total(state.unfinished() & runs),
        waiting=total(unfinished & ~runs),
        preempted=total(decision.preempted),
        run=after_progress.iterations - progress.iterations,
        run_decodes=batch,
        run_context=context + batch,
        run_first=first,
        run_growth=growth,
        run_blocks=blocks(middle.computed + 1),
        run_last_blocks=blocks(after.computed),
    )
    return (after, after_progress), row, decision.tokens > 0


def _harvest(
    params: EnvParams, state: EngineState, carried: _Carried, results: Results
) -> tuple[EngineState, _Carried, Results]:
    """Notes what finished, and takes it out."""
    done = finished(params.engines, state)
    served = done & (state.finish_time > IGNORED)
    at = jnp.where(served, carried.index, results.tokens.shape[0])
    put = lambda old, new: old.at[at].set(new, mode="drop")  # noqa: E731
    latency = state.finish_time - carried.arrival
    results = Results(
        latency=put(results.latency, latency),
        first_token=put(results.first_token, state.first_token_time - carried.arrival),
        admitted=put(results.admitted, carried.admitted - carried.arrival),
        tokens=put(results.tokens, state.generated),
        preemptions=put(results.preemptions, state.preemptions),
        met=put(results.met, latency / jnp.maximum(state.generated, 1) < params.latency_limit),
    )
    state, carried = remove(state, carried, done)
    return state, carried, results


def _at_next_arrival(
    params: EnvParams, gap: jax.Array, state: EngineState, carried: _Carried
) -> tuple[EngineState, _Carried]:
    """Moves the present on, as the environment does."""
    state = state.replace(clock=state.clock - gap, first_token_time=state.first_token_time - gap)
    if params.engines.async_output_proc is not None:
        state = state.replace(finish_time=state.finish_time - gap)
    return state, carried.replace(arrival=carried.arrival - gap, admitted=carried.admitted - gap)
