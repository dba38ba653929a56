"""A step of the routing environment for a batch: route, run, collect, reward, observe, and end finished episodes.

The B environments are the last axis of all arrays here, [slots, experts, B], except in observations and in the timing
record of the totals, where they are the first axis (see `batching`).
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxroute.environment.abandonment import run_with_patience, without_late
from jaxroute.environment.affinity import estimated_share, exact_share, note_sent, restarted
from jaxroute.environment.batching import run_if
from jaxroute.environment.few_slots import take_both
from jaxroute.environment.impact import action_penalty
from jaxroute.environment.metrics import (
    Completed,
    EpisodeTotals,
    add_completed,
    add_work,
    empty_totals,
    totals_first,
    totals_last,
)
from jaxroute.environment.observation import RoutingGraph, flatten, observe
from jaxroute.environment.settings import Settings
from jaxroute.environment.signals import counted
from jaxroute.environment.state import (
    RECENT_COMPLETIONS,
    RECENT_GAPS,
    EnvParams,
    EnvState,
    QueuedRequests,
    Scrape,
)
from jaxroute.environment.turns import NOBODY, Arrival, Outcome, Taken, Turn
from jaxroute.simulator.advance import EngineWork
from jaxroute.simulator.cluster import AFTER_ALL, Finished, collect, restart, route, run_until, shift_time
from jaxroute.simulator.engine import total

Observation = RoutingGraph | jax.Array


def step(
    settings: Settings, state: EnvState, action: jax.Array, arrival: Arrival, first: Arrival, params: EnvParams
) -> Outcome:
    """Routes by `action` (int32 [B]) and runs to `arrival`. If the episode ends there, the open requests run to their
    end and are added to the totals, and a new episode begins with `first`.
    """
    state = _begin_totals(settings, state)
    ends = state.step + 1 >= settings.episode_length
    inside = (action >= 0) & (action < settings.num_experts)
    action = jnp.where(inside, action, settings.num_experts)
    everyone = jnp.ones_like(ends)
    decision = Turn(everyone, action, arrival.gap, arrival, ends=jnp.bool_(False))
    # The end of an episode is a turn without a routed request, which runs until all requests have ended.
    end = Turn(everyone, action, jnp.full_like(arrival.gap, AFTER_ALL), first, ends=jnp.bool_(True))
    end = end.only(ends).replace(action=jnp.full_like(action, NOBODY))
    return take_both(lambda state, turn: take_turn(settings, state, turn, params), state, decision, end)


@partial(jax.jit, static_argnums=0, inline=True)  # a step takes it twice: what is traced for equal shapes is shared
def take_turn(settings: Settings, state: EnvState, turn: Turn, params: EnvParams) -> Taken:
    """A turn of the participating environments, on any number of slots that holds all of their requests."""
    now = params.at(state.step)
    penalty = action_penalty(settings, state, turn.action, now)
    state, joined = _route(settings, state, turn.action, now)
    state, finished, work = _run(state, turn.until, now)
    completed = _completed(finished)
    qos, credit = _reward(completed, now)
    state = _count(settings, state, finished, completed, work, now)
    state = _move_on(settings, state, turn, qos, now)
    return Taken(state, observe_batch(settings, state, params), qos, credit, jnp.where(joined, penalty, 0))


def drain(state: EnvState, params: EnvParams) -> jax.Array:
    """QoS, float [B], of the requests that have joined, if the engines run until they are empty."""
    now = params.at(state.step)
    _, finished, _ = _run(state, jnp.full(state.step.shape, AFTER_ALL), now)
    return _reward(_completed(finished), now)[0]


def observe_batch(settings: Settings, state: EnvState, params: EnvParams) -> Observation:
    """The observation, graph or flat as in `settings`, leaves [B, ...]."""
    now, state = params.at(state.step), state.visible()
    share = None if settings.prefix_share == "off" else prefix_share(settings, state, now)
    observation = observe(state, now, settings.queue_nodes, settings.slots, settings.drop, settings.features, share)
    return flatten(observation) if settings.obs == "flat" else observation


def prefix_share(settings: Settings, state: EnvState, params: EnvParams) -> jax.Array:
    """float [N, ...]: the share of the arriving prompt that each expert holds, as the router knows it; any axes."""
    if settings.prefix_share == "exact":
        return exact_share(state.engines, state.request, params.engines)
    assert state.sent is not None and params.prefix_expiry is not None
    return estimated_share(state.sent, state.request, params.prefix_expiry, settings.num_experts)


def _begin_totals(settings: Settings, state: EnvState) -> EnvState:
    """Empties the totals in the first step of an episode. If this happened at the end of the previous episode, the
    environment would have to hold both totals and copy them at every step."""
    begins = state.step == 0

    def empty(totals: EpisodeTotals) -> EpisodeTotals | None:
        zero = empty_totals(settings.num_experts, settings.metrics, settings.episode_length)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return totals_last(jax.tree.map(choose, zero, totals_first(totals)))

    return state if state.totals is None else state.replace(totals=run_if(jnp.any(begins), empty, state.totals))


def _route(settings: Settings, state: EnvState, action: jax.Array, params: EnvParams) -> tuple[EnvState, jax.Array]:
    """Sends the arriving request to the chosen expert. Also returns whether it joined the queue there, bool [B]."""
    request, totals = state.request, state.totals
    chosen = jnp.arange(settings.num_experts)[:, None] == action
    own = QueuedRequests(
        arrival=0.0,  # pyright: ignore[reportArgumentType]
        index=state.step,
        score=request.score,
        predicted_score=request.predicted_score,
        predicted_tokens=request.predicted_output_tokens,
    )
    lengths = request.prompt_tokens, request.output_tokens
    engines, queued, admission = route(
        state.engines, state.queued, chosen, *lengths, own, params.engines, request.prefix
    )
    arrives = action != NOBODY
    if totals is not None:
        totals = totals.replace(
            arrived=totals.arrived + arrives,
            dropped=totals.dropped + (action == settings.num_experts),
            rejected_infeasible=totals.rejected_infeasible + admission.infeasible,
            rejected_full=totals.rejected_full + admission.full,
        )
    joined = jnp.any(admission.joined, axis=0)
    sent = None if state.sent is None else note_sent(state.sent, request, action, joined)
    state = state.replace(engines=engines, queued=queued, totals=totals, step=state.step + arrives, sent=sent)
    return state, joined


def _run(state: EnvState, until: jax.Array, params: EnvParams) -> tuple[EnvState, Finished, EngineWork]:
    """Runs every iteration that starts before `until` (s) and removes the finished requests."""
    if params.patience is None:
        engines, work, _ = run_until(state.engines, until, params.engines)
        engines, queued, finished = collect(engines, state.queued, params.engines)
    else:
        leaves = state.queued.arrival + params.patience
        engines, work = run_with_patience(state.engines, leaves, until, params.engines)
        engines, queued, finished = collect(engines, state.queued, params.engines, aborts=True)
        finished = without_late(finished, leaves)
    return state.replace(engines=engines, queued=queued), finished, work


def _completed(finished: Finished) -> Completed:
    engines, queued = finished.engines, finished.payload
    return Completed(
        served=finished.served,
        index=queued.index,
        tokens=jnp.maximum(engines.generated, 1),
        score=queued.score,
        preemptions=engines.preemptions,
        arrival=queued.arrival,
        first_token=engines.first_token_time,
        finish=engines.finish_time,
    )


def _reward(completed: Completed, params: EnvParams) -> tuple[jax.Array, jax.Array]:
    """QoS of the finished requests, and their credit in the reward (`EnvParams.credit_discount`), float [B] each."""
    qos = credit = completed.qos(params.qos_rule)
    if params.credit_discount is not None:
        credit = jnp.where(completed.served, qos * params.credit_discount**completed.arrival, 0)
    return jnp.sum(total(qos), axis=0), jnp.sum(total(credit), axis=0)


def _count(
    settings: Settings, state: EnvState, finished: Finished, completed: Completed, work: EngineWork, params: EnvParams
) -> EnvState:
    """Adds the work and the completed requests to the totals, and to the mean latency of recent completions."""
    totals = state.totals
    if totals is not None:
        totals = add_work(totals, work, params.engines.usable_blocks)
        if params.patience is None:
            totals = totals.replace(rejected_infeasible=totals.rejected_infeasible + finished.ignored)
        else:
            totals = totals.replace(abandoned=totals.abandoned + finished.ignored)
        totals = add_completed(totals, settings.metrics, completed, params.qos_rule)
    latency = (completed.finish - completed.arrival) / completed.tokens
    count = total(completed.served)
    mean = total(jnp.where(completed.served, latency, 0)) / jnp.maximum(count, 1)
    kept = jnp.where(state.recent_latency > 0, (1 - 1 / RECENT_COMPLETIONS) ** count, count == 0)
    return state.replace(totals=totals, recent_latency=kept * state.recent_latency + (1 - kept) * mean)


def _move_on(settings: Settings, state: EnvState, turn: Turn, qos: jax.Array, params: EnvParams) -> EnvState:
    """Moves the origin of times to the arrival. If an episode begins, the state is then the same as after a reset."""
    waited = jnp.maximum(jnp.max(state.engines.clock, axis=0), 0)
    gap = jnp.where(turn.takes_part, jnp.where(turn.ends, waited, turn.arrival.gap), 0)
    begins = turn.takes_part & turn.ends
    totals = state.totals
    if totals is not None:
        drained = jnp.where(turn.ends, qos, 0)
        totals = totals.replace(drained_qos=totals.drained_qos + drained, elapsed=totals.elapsed + gap)
    # `step` has been increased, so it is the number of gaps.
    change = (gap - state.recent_gap) / jnp.clip(state.step, 1, RECENT_GAPS)
    recent_gap = state.recent_gap + jnp.where(turn.takes_part, change, 0)
    engines = restart(shift_time(state.engines, gap, params.engines), begins)
    queued = state.queued.replace(arrival=state.queued.arrival - gap)

    def arrived(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(turn.takes_part, new, old)

    request = jax.tree.map(arrived, turn.arrival.request, state.request)
    scrape = state.scrape
    if scrape is not None:
        seen = counted(engines, queued, request, params.engines) if settings.signals == "counts" else (engines, queued)
        present = Scrape(*seen, scrape.age + gap)
        delay = 0 if params.signal_delay is None else params.signal_delay
        scrape = _scrape(scrape, present, turn.takes_part & (begins | (present.age >= delay)))
    return state.replace(
        engines=engines,
        queued=queued,
        scrape=scrape,
        request=request,
        workload=jax.tree.map(arrived, turn.arrival.workload, state.workload),
        step=jnp.where(begins, 0, state.step),
        recent_gap=jnp.where(begins, 0, recent_gap),
        recent_latency=jnp.where(begins, 0, state.recent_latency),
        totals=totals,
        sent=None if state.sent is None else restarted(state.sent, gap, begins),
    )


def _scrape(last: Scrape, present: Scrape, due: jax.Array) -> Scrape:
    """The scrape that the router has at the next decision: a new one where it is `due` (bool [B]).

    `present`, which may have fewer slots, is the state then and the age of `last`.
    """

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        if new.shape[0] < old.shape[0]:
            new = jnp.concatenate([new, old[new.shape[0] :]])
        return jnp.where(due, new, old)

    newest = jax.tree.map(choose, present, last)
    return newest.replace(age=jnp.where(due, 0, present.age))
