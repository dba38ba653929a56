"""From one decision to the next, for a batch of environments: route, run the cluster, count what finished, observe.

B environments are the last axis of all arrays here, [slots, experts, B], except in observations and in the totals'
timing record, where they are the first (see `batching`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.batching import batch_first, batch_last, keep_batch_last, once
from jaxroute.environment.impact import Queue, exact_impact, paper_impact, predicted_impact
from jaxroute.environment.metrics import (
    Completed,
    EpisodeTotals,
    add_completed,
    empty_totals,
    totals_first,
    totals_last,
)
from jaxroute.environment.observation import GraphObservation, flatten, observe
from jaxroute.environment.state import EnvParams, EnvState, SlotPayload
from jaxroute.simulator.advance import Progress
from jaxroute.simulator.advance_kernel import advance_engines
from jaxroute.simulator.engine import EngineState, blocks_for, empty_engine, slot_positions, target_tokens, total
from jaxroute.simulator.recorded import AFTER_ALL
from jaxroute.simulator.slots import append, finished, remove
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request

if TYPE_CHECKING:
    from jaxroute.environment.environment import RoutingEnvironment

FEW_SLOTS = 16
"""While no expert of a batch holds as many requests, only so many slots are worked on."""

Observation = GraphObservation | jax.Array
Queues = tuple[EngineState, SlotPayload]


class Arrival(struct.PyTreeNode):
    """The next arrival of each environment."""

    gap: jax.Array  # float [B], s from this decision to it
    request: Request
    workload: WorkloadState  # after it


class Outcome(struct.PyTreeNode):
    """What a decision leads to."""

    state: EnvState  # at the next arrival
    observation: Observation
    qos: jax.Array  # float [B], of what finished in between
    penalty: jax.Array  # float [B], 0 where the request joined no expert


def transition(
    env: RoutingEnvironment, params: EnvParams, state: EnvState, action: jax.Array, arrival: Arrival
) -> Outcome:
    """Routes by `action` (int32 [B]) and runs to `arrival`, before any reset."""
    state = _begin_totals(env, state)
    if env.slots <= FEW_SLOTS:
        return _transition(env, params, state, action, arrival, arrival.gap)
    few = jnp.max(state.engines.num_requests) < FEW_SLOTS
    # Where there are more, this runs nothing, and is thrown away.
    until = jnp.where(few, arrival.gap, -AFTER_ALL)
    outcome = _transition(env, params, _with_queues(state, _front(_queues(state))), action, arrival, until)

    def on_all_slots(carry: tuple[Queues, Outcome]) -> tuple[Queues, Outcome]:
        queues, thrown_away = carry
        before, empty = _with_queues(state, batch_last(queues)), thrown_away.state.totals
        if before.totals is not None and empty is not None:
            # Nothing was written to it, and with one of them it can be changed in place.
            before = before.replace(totals=before.totals.replace(timing_record=empty.timing_record))
        outcome = _transition(env, params, before, action, arrival, arrival.gap)
        queues = _queues(outcome.state)
        outcome = outcome.replace(state=_with_queues(outcome.state, _front(queues)))
        return jax.tree.map(keep_batch_last, batch_first(queues)), outcome

    # With environments first, as they came in, XLA needs no copy of the queues around the loop.
    queues, outcome = once(~few, on_all_slots, (batch_first(_queues(state)), outcome))
    put_back = lambda old, new: old.at[:, :FEW_SLOTS].set(new) if new.ndim == 3 else new  # noqa: E731
    queues = jax.tree.map(put_back, queues, batch_first(_queues(outcome.state)))
    return outcome.replace(state=_with_queues(outcome.state, batch_last(queues)))


def _queues(state: EnvState) -> Queues:
    return state.engines, state.slots


def _with_queues(state: EnvState, queues: Queues) -> EnvState:
    return state.replace(engines=queues[0], slots=queues[1])


def _front(queues: Queues) -> Queues:
    return jax.tree.map(lambda leaf: leaf[:FEW_SLOTS] if leaf.ndim == 3 else leaf, queues)


def end_episodes(
    env: RoutingEnvironment, params: EnvParams, outcome: Outcome, truncated: jax.Array, first: Arrival
) -> tuple[EnvState, Observation]:
    """Where `truncated` (bool [B]): the next episode's state, which begins with `first`, with the old one's totals, for
    which the requests still open run to their end; and its first observation. Elsewhere what `outcome` has."""
    state = outcome.state
    idle = empty_engine(1, (env.num_experts, truncated.shape[0]))
    nothing = jnp.zeros_like(idle.first_token_time)
    no_requests = SlotPayload(nothing, idle.generated, nothing, nothing, idle.generated)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(truncated, a, b), new, old)

    def choose_first(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(truncated.reshape(-1, *[1] * (b.ndim - 1)), a, b), new, old)

    # Slots out of use may hold anything, so the counters are all of the queues that needs a reset.
    counters = {name: getattr(state.engines, name) for name in ("num_requests", "num_running", "clock")}
    next_state = state.replace(
        engines=state.engines.replace(**choose(jax.tree.map(jnp.zeros_like, counters), counters)),
        request=choose(first.request, state.request),
        workload=choose(first.workload, state.workload),
        step=choose(jnp.int32(0), state.step),
    )

    def end(carry: tuple[Queues, EpisodeTotals | None, Observation]):
        queues, totals, observation = carry
        if totals is not None:
            full = _with_queues(state.replace(totals=totals), batch_last(queues))
            drained, qos = _run(env, params, full, jnp.asarray(AFTER_ALL, float))
            final = drained.totals
            assert final is not None  # as totals
            rest = jnp.maximum(jnp.max(drained.engines.clock, axis=0), 0)
            final = final.replace(drained_qos=final.drained_qos + qos, elapsed=final.elapsed + rest)
            totals = totals_last(choose_first(totals_first(final), totals_first(totals)))
        start = observe_batch(env, params, next_state.replace(engines=idle, slots=no_requests))
        return jax.tree.map(keep_batch_last, queues), totals, choose_first(start, observation)

    carry = (batch_first(_queues(state)), state.totals, outcome.observation)
    _, totals, observation = once(jnp.any(truncated), end, carry)
    return next_state.replace(totals=totals), observation


def observe_batch(env: RoutingEnvironment, params: EnvParams, state: EnvState) -> Observation:
    """The observation of the kind that `env` gives, leaves [B, ...]."""
    observation = observe(params, state, env.queue_nodes, env.slots)
    return jax.vmap(flatten)(observation) if env.obs == "flat" else observation


def _transition(
    env: RoutingEnvironment,
    params: EnvParams,
    state: EnvState,
    action: jax.Array,
    arrival: Arrival,
    until: jax.Array,
) -> Outcome:
    """As `transition`, with any number of slots in `state` that holds all requests; runs the cluster up to `until`."""
    penalty = _penalty(env, params, state, action)
    state, joined = _route(env, params, state, action)
    state, qos = _run(env, params, state, until)
    gap, engines, slots, totals = arrival.gap, state.engines, state.slots, state.totals
    if totals is not None:
        totals = totals.replace(elapsed=totals.elapsed + gap)
    state = state.replace(
        engines=engines.replace(clock=engines.clock - gap, first_token_time=engines.first_token_time - gap),
        slots=slots.replace(arrival=slots.arrival - gap),
        request=arrival.request,
        workload=arrival.workload,
        totals=totals,
    )
    return Outcome(state, observe_batch(env, params, state), qos, jnp.where(joined, penalty, 0))


def _begin_totals(env: RoutingEnvironment, state: EnvState) -> EnvState:
    """Empty totals in the first step of an episode. Not at the end of the one before: then the environment would hold
    both, and copy them at every step."""
    begins = state.step == 0

    def empty(totals: EpisodeTotals) -> EpisodeTotals:
        zero = empty_totals(env.num_experts, env.metrics, env.episode_length)
        choose = lambda a, b: jnp.where(begins.reshape(-1, *[1] * (b.ndim - 1)), a, b)  # noqa: E731
        chosen = totals_last(jax.tree.map(choose, zero, totals_first(totals)))
        assert chosen is not None
        return chosen

    return state if state.totals is None else state.replace(totals=once(jnp.any(begins), empty, state.totals))


def _of_expert(expert: jax.Array, tree: Any) -> Any:
    """Leaves [..., N, B] to [..., B]: those of each environment's `expert` (int32 [B]; out of range: the nearest)."""

    def select(leaf: jax.Array) -> jax.Array:
        chosen = leaf[..., 0, :]
        for other in range(1, leaf.shape[-2]):
            chosen = jnp.where(expert >= other, leaf[..., other, :], chosen)
        return chosen

    return jax.tree.map(select, tree)


def _penalty(env: RoutingEnvironment, params: EnvParams, state: EnvState, action: jax.Array) -> jax.Array:
    """The penalty of sending the arriving request to the chosen expert, float [B]."""
    if env.penalty == "off":
        return jnp.zeros(action.shape, float)
    request = state.request
    lengths = request.output_tokens if env.penalty == "paper" else request.predicted_output_tokens
    engine, slots, engine_params, output_tokens = _of_expert(
        action, (state.engines, state.slots, params.engines, lengths)
    )
    queue = Queue(
        engine=engine,
        age=-slots.arrival,
        score=slots.score,
        predicted_score=slots.predicted_score,
        predicted_tokens=slots.predicted_tokens,
        prompt_tokens=request.prompt_tokens,
        output_tokens=output_tokens,
    )
    if env.penalty == "paper":
        k1, k2 = _of_expert(action, (params.penalty_prefill, params.penalty_context))
        return paper_impact(k1, k2, params.latency_limit, queue, engine.target_tokens)
    impact = exact_impact if env.penalty == "exact" else predicted_impact
    return impact(engine_params, params.latency_limit, queue)


def _route(
    env: RoutingEnvironment, params: EnvParams, state: EnvState, action: jax.Array
) -> tuple[EnvState, jax.Array]:
    """Appends the request to the chosen expert's queue, if it fits there; also whether it did, bool [B]."""
    request, engines = state.request, params.engines
    chosen = jnp.arange(env.num_experts)[:, None] == action
    # simulation.md section 1, rule 8: what could never finish is rejected here, by its true length.
    length = jnp.minimum(request.prompt_tokens + request.output_tokens, engines.max_model_len)
    feasible = blocks_for(length - 1, engines.block_size) <= engines.usable_blocks
    whole = request.prompt_tokens + request.output_tokens - 1
    feasible &= engines.enable_chunked_prefill | (whole <= engines.max_num_batched_tokens)
    feasible &= request.prompt_tokens < engines.max_model_len
    free = state.engines.num_requests < env.slots
    joins = chosen & feasible & free

    target = target_tokens(request.prompt_tokens, request.output_tokens, engines.max_model_len)
    at_tail = joins & (slot_positions(state.slots.arrival) == state.engines.num_requests)
    put = lambda new, old: jnp.where(at_tail, new, old)  # noqa: E731
    slots = SlotPayload(
        arrival=put(0.0, state.slots.arrival),
        index=put(state.step, state.slots.index),
        score=put(request.score, state.slots.score),
        predicted_score=put(request.predicted_score, state.slots.predicted_score),
        predicted_tokens=put(request.predicted_output_tokens, state.slots.predicted_tokens),
    )
    queues = append(state.engines, joins, request.prompt_tokens, target, jnp.zeros((), float))
    totals = state.totals
    if totals is not None:
        totals = totals.replace(
            arrived=totals.arrived + 1,
            dropped=totals.dropped + ~jnp.any(chosen, axis=0),
            rejected_infeasible=totals.rejected_infeasible + (chosen & ~feasible),
            rejected_full=totals.rejected_full + (chosen & feasible & ~free),
        )
    state = state.replace(engines=queues, slots=slots, totals=totals, step=state.step + 1)
    return state, jnp.any(joins, axis=0)


def _run(env: RoutingEnvironment, params: EnvParams, state: EnvState, until: jax.Array) -> tuple[EnvState, jax.Array]:
    """Runs every iteration that starts before `until` (s) and takes out what finished; also its QoS, float [B]."""
    nothing = Progress.none(state.engines.num_requests.shape)
    engines, progress = advance_engines(params.engines, state.engines, nothing, until)
    slots, totals = state.slots, state.totals
    done = finished(engines)
    completed = Completed(
        present=done,
        index=slots.index,
        tokens=jnp.maximum(engines.generated, 1),
        score=slots.score,
        preemptions=engines.preemptions,
        arrival=slots.arrival,
        first_token=engines.first_token_time,
        finish=engines.finish_time,
    )
    qos = jnp.sum(total(completed.qos(params.latency_limit)), axis=0)
    if totals is not None:
        totals = totals.replace(
            busy=totals.busy + progress.busy_time,
            block_seconds=totals.block_seconds + progress.block_seconds,
            kv_seconds=totals.kv_seconds + progress.block_seconds / params.engines.usable_blocks,
        )
        totals = add_completed(totals, env.metrics, completed, params.latency_limit)
    engines, slots = remove(engines, slots, done)
    return state.replace(engines=engines, slots=slots, totals=totals), qos
