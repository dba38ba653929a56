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
from jaxroute.environment.state import RECENT_COMPLETIONS, RECENT_GAPS, EnvParams, EnvState, SlotPayload
from jaxroute.simulator.advance import Progress
from jaxroute.simulator.advance_kernel import advance_engines
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import IGNORED, EngineState, slot_positions, target_tokens, total
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

    state: EnvState  # at the next decision: at the next arrival, or in environments that end, at a new episode's first
    observation: Observation  # of it
    final_observation: Observation  # at the next arrival, whether the episode ends or not
    qos: jax.Array  # float [B], of what finished up to the next arrival
    credit: jax.Array  # float [B], that as the reward counts it (`EnvParams.credit_discount`)
    penalty: jax.Array  # float [B], 0 where the request joined no expert


def transition(
    env: RoutingEnvironment,
    params: EnvParams,
    state: EnvState,
    action: jax.Array,
    ends: jax.Array,
    arrival: Arrival,
    first: Arrival,
) -> Outcome:
    """Routes by `action` (int32 [B]) and runs to `arrival`. Where the episode `ends` with that (bool [B]), the requests
    still open then run to their end, which the totals count, and a new episode begins with `first`.

    The end of an episode is one more transition: nothing is routed, and the next arrival comes when all is done.
    """
    state = _begin_totals(env, state)
    few = (jnp.max(state.engines.num_requests) < FEW_SLOTS) | (env.slots <= FEW_SLOTS)
    queues = (state.engines, state.slots)
    front = jax.tree.map(lambda leaf: leaf[:FEW_SLOTS] if leaf.ndim == 3 else leaf, queues)
    # Where there are more requests, this routes and runs nothing, so that the queues stay; the rest is thrown away.
    until = jnp.where(few, arrival.gap, -AFTER_ALL)
    routed, coming = jnp.where(few, action, -1), arrival.replace(gap=jnp.where(few, arrival.gap, 0))
    now = _transition(env, params, _with_queues(state, front), routed, coming, until, jnp.bool_(False))
    front = (now.state.engines, now.state.slots)
    outcome = now.replace(state=now.state.replace(engines=None, slots=None))

    # With environments first, as they came in, XLA needs no copy of the queues around the loop.
    put = lambda old, new: keep_batch_last(old.at[:, :FEW_SLOTS].set(new) if new.ndim == 3 else new)  # noqa: E731
    queues = jax.tree.map(put, batch_first(queues), batch_first(front))

    def on_all_slots(carry: tuple[jax.Array, jax.Array, Queues, Outcome]):
        crowded, _, queues, outcome = carry
        ending = ~crowded
        before = _choose(ending, _small(outcome.state), _small(state))
        # Nothing has been written to a record that is thrown away, and with one of them it is changed in place.
        before = _with_record(_with_queues(before, batch_last(queues)), outcome.state.totals)
        until = jnp.where(ending, jnp.where(ends, AFTER_ALL, -AFTER_ALL), arrival.gap)
        routed, coming = _choose(ending, (jnp.full_like(action, -1), first), (action, arrival))
        now = _transition(env, params, before, routed, coming, until, ending)

        same = ending & ~ends
        after = _choose_first(same, queues, batch_first((now.state.engines, now.state.slots)))
        small = _with_record(_choose(same, _small(before), _small(now.state)), now.state.totals)
        outcome = Outcome(
            state=small,
            observation=_choose_first(same, outcome.observation, now.observation),
            final_observation=_choose(ending, outcome.final_observation, now.observation),
            qos=jnp.where(ending, outcome.qos, now.qos),
            credit=jnp.where(ending, outcome.credit, now.credit),
            penalty=jnp.where(ending, outcome.penalty, now.penalty),
        )
        return jnp.bool_(False), ~ending & jnp.any(ends), jax.tree.map(keep_batch_last, after), outcome

    carry = (~few, jnp.any(ends), queues, outcome)
    *_, queues, outcome = jax.lax.while_loop(lambda carry: carry[0] | carry[1], on_all_slots, carry)
    return outcome.replace(state=_with_queues(outcome.state, batch_last(queues)))


def _with_queues(state: EnvState, queues: Queues) -> EnvState:
    return state.replace(engines=queues[0], slots=queues[1])


def _small(state: EnvState) -> EnvState:
    """The state without queues and timing record."""
    totals = state.totals and state.totals.replace(timing_record=None)
    return state.replace(engines=None, slots=None, totals=totals)


def _with_record(state: EnvState, totals: EpisodeTotals | None) -> EnvState:
    """The state with the timing record of these totals."""
    if state.totals is None or totals is None:
        return state
    return state.replace(totals=state.totals.replace(timing_record=totals.timing_record))


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` where `condition` (bool [] or [B]) holds, else of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _choose_first(condition: jax.Array, new: Any, old: Any) -> Any:
    """As `_choose`, for leaves [B, ...]."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (b.ndim - 1)), a, b), new, old)


def observe_batch(env: RoutingEnvironment, params: EnvParams, state: EnvState) -> Observation:
    """The observation of the kind that `env` gives, leaves [B, ...]."""
    observation = observe(params.present(state.step), state, env.queue_nodes, env.slots, env.drop)
    return flatten(observation) if env.obs == "flat" else observation


def _transition(
    env: RoutingEnvironment,
    params: EnvParams,
    state: EnvState,
    action: jax.Array,
    arrival: Arrival,
    until: jax.Array,
    ending: jax.Array,
) -> Outcome:
    """As `transition`, on any number of slots that holds all requests, up to `until` (float [B]).

    `ending` (bool []): this ends episodes. Then there was no decision, and time goes on until all is done.
    """
    before = state.totals
    present = params.present(state.step)
    penalty = _penalty(env, present, state, action)
    state, joined = _route(env, present, state, action)
    state, qos, credit = _run(env, present, state, until)
    engines, slots, totals = state.engines, state.slots, state.totals
    gap = jnp.where(ending, jnp.maximum(jnp.max(engines.clock, axis=0), 0), arrival.gap)
    if totals is not None and before is not None:
        totals = totals.replace(
            arrived=jnp.where(ending, before.arrived, totals.arrived),
            dropped=jnp.where(ending, before.dropped, totals.dropped),
            drained_qos=before.drained_qos + jnp.where(ending, qos, 0),
            elapsed=totals.elapsed + gap,
        )
    clock = jnp.where(ending, 0, engines.clock - gap)
    # By now `step` counts the gaps too.
    recent_gap = state.recent_gap + (gap - state.recent_gap) / jnp.minimum(state.step, RECENT_GAPS)
    if params.engines.async_output_proc is not None:  # a request that has finished may be here for one more iteration
        engines = engines.replace(finish_time=engines.finish_time - gap)
    state = state.replace(
        engines=engines.replace(clock=clock, first_token_time=engines.first_token_time - gap),
        slots=slots.replace(arrival=slots.arrival - gap),
        request=arrival.request,
        workload=arrival.workload,
        step=jnp.where(ending, 0, state.step),
        recent_gap=jnp.where(ending, 0, recent_gap),
        recent_latency=jnp.where(ending, 0, state.recent_latency),
        totals=totals,
    )
    observation = observe_batch(env, params, state)
    return Outcome(state, observation, observation, qos, credit, jnp.where(joined, penalty, 0))


def _begin_totals(env: RoutingEnvironment, state: EnvState) -> EnvState:
    """Empty totals in the first step of an episode. Not at the end of the one before: then the environment would hold
    both, and copy them at every step."""
    begins = state.step == 0

    def empty(totals: EpisodeTotals) -> EpisodeTotals | None:
        zero = empty_totals(env.num_experts, env.metrics, env.episode_length)
        return totals_last(_choose_first(begins, zero, totals_first(totals)))

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
    can_finish = rules(engines).can_serve(engines, request.prompt_tokens, request.output_tokens)
    free = state.engines.num_requests < env.slots
    joins = chosen & can_finish & free

    target = target_tokens(request.prompt_tokens, request.output_tokens, rules(engines).longest(engines))
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
            rejected_infeasible=totals.rejected_infeasible + (chosen & ~can_finish),
            rejected_full=totals.rejected_full + (chosen & can_finish & ~free),
        )
    state = state.replace(engines=queues, slots=slots, totals=totals, step=state.step + 1)
    return state, jnp.any(joins, axis=0)


def _run(
    env: RoutingEnvironment, params: EnvParams, state: EnvState, until: jax.Array
) -> tuple[EnvState, jax.Array, jax.Array]:
    """Runs every iteration that starts before `until` (s) and takes out what finished; also its QoS and that as the
    reward counts it, float [B]."""
    nothing = Progress.none(state.engines.num_requests.shape)
    engines, progress = advance_engines(params.engines, state.engines, nothing, until)
    slots, totals = state.slots, state.totals
    done = finished(params.engines, engines)
    served = done
    if rules(params.engines).ignores:
        served = done & (engines.finish_time > IGNORED)
        if totals is not None:
            ignored = total(done & ~served)
            totals = totals.replace(rejected_infeasible=totals.rejected_infeasible + ignored)
    completed = Completed(
        present=served,
        index=slots.index,
        tokens=jnp.maximum(engines.generated, 1),
        score=slots.score,
        preemptions=engines.preemptions,
        arrival=slots.arrival,
        first_token=engines.first_token_time,
        finish=engines.finish_time,
    )
    qos = completed.qos(params.latency_limit)
    credit = qos
    if params.credit_discount is not None:
        credit = jnp.where(served, qos * params.credit_discount**slots.arrival, 0)
    qos, credit = (jnp.sum(total(values), axis=0) for values in (qos, credit))
    if totals is not None:
        totals = totals.replace(
            busy=totals.busy + progress.busy_time,
            block_seconds=totals.block_seconds + progress.block_seconds,
            kv_seconds=totals.kv_seconds + progress.block_seconds / params.engines.usable_blocks,
        )
        totals = add_completed(totals, env.metrics, completed, params.latency_limit)
    latency = (completed.finish - completed.arrival) / completed.tokens
    count = total(served)
    mean = total(jnp.where(served, latency, 0)) / jnp.maximum(count, 1)
    kept = jnp.where(state.recent_latency > 0, (1 - 1 / RECENT_COMPLETIONS) ** count, count == 0)
    recent_latency = kept * state.recent_latency + (1 - kept) * mean
    engines, slots = remove(engines, slots, done)
    return state.replace(engines=engines, slots=slots, recent_latency=recent_latency, totals=totals), qos, credit
