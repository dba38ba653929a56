"""The routing environment: one step is one arrival, which the action sends to an expert or drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxroute.environment.impact import Queue, exact_impact, paper_impact, predicted_impact
from jaxroute.environment.metrics import LEVELS, Completed, EpisodeTotals, Level, add_completed, empty_totals
from jaxroute.environment.observation import GraphObservation, flatten, observe
from jaxroute.environment.state import EnvParams, EnvState, SlotPayload
from jaxroute.errors import UserError, known
from jaxroute.simulator.advance import Progress, advance
from jaxroute.simulator.engine import EngineState, blocks_for, empty_engine, target_tokens
from jaxroute.simulator.recorded import AFTER_ALL
from jaxroute.simulator.slots import append, first_finished, remove
from jaxroute.workload.request import Request

Penalty = Literal["predicted", "paper", "exact", "off"]
PENALTIES: tuple[Penalty, ...] = ("predicted", "paper", "exact", "off")
Observation = GraphObservation | jax.Array


@dataclass(frozen=True)
class RoutingEnvironment:
    """N experts behind a router. All fields are static; whatever may vary in a sweep is in `EnvParams`.

    `reset` and `step` are pure functions of one environment, for `jax.jit` and `jax.vmap`. The arrivals depend on the
    keys alone, never on actions: the same keys are the same request stream for every router.
    """

    num_experts: int
    slots: int = 48  # S: requests that one expert holds, running and waiting; one more is a counted rejection
    queue_nodes: int = 10  # K: running and waiting requests that are observed of each expert
    episode_length: int = 5000  # requests
    obs: Literal["graph", "flat"] = "graph"  # a `GraphObservation`, or one flat vector
    penalty: Penalty = "predicted"  # form of the action impact estimator
    metrics: Level = "histogram"

    def __post_init__(self) -> None:
        choices = {"obs": ("graph", "flat"), "penalty": PENALTIES, "metrics": LEVELS}
        for name, allowed in choices.items():
            known(getattr(self, name), allowed, name)
        for name in ("num_experts", "slots", "queue_nodes", "episode_length"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise UserError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")

    @property
    def num_actions(self) -> int:
        """N + 1: send to expert 0..N-1, or drop."""
        return self.num_experts + 1

    def reset(self, key: jax.Array, params: EnvParams) -> tuple[Observation, EnvState]:
        """A fresh episode at its first arrival, with idle experts."""
        key_start, key_request = jax.random.split(key)
        workload, _, request = params.workload.sample(key_request, params.workload.reset(key_start))
        state = self._fresh(request, workload)
        return self._observe(params, state), state

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[Observation, EnvState, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Routes the arriving request by `action` (int32 [], 0..N) and runs the cluster to the next arrival.

        N drops the request, and so does any number outside of 0..N.

        Returns (observation, state, reward, terminated, truncated, info). Reward, float []: QoS of the requests that
        finished since the last decision, less penalty_weight times the penalty. An episode is truncated after
        `episode_length` requests and never terminates; the returned observation and state are then the next episode's.

        info: "final_observation", the observation at the next arrival before any reset; "qos", float []: QoS in this
        step; "penalty", float []; "episode": the episode's `EpisodeTotals` so far (None with metrics off), complete,
        with the drain, where truncated. What is drained counts in them and in no reward.
        """
        key_arrival, key_reset = jax.random.split(key)
        penalty = self._penalty(params, state, action)
        state, joined = self._route(params, state, action)
        uniforms = params.workload.draw(key_arrival)
        workload, gap, request = params.workload.next(uniforms, state.workload)
        state, qos = self._advance(params, state, gap)
        reward = qos - params.penalty_weight * jnp.where(joined, penalty, 0)
        state = state.replace(request=request, workload=workload)
        final_observation = self._observe(params, state)

        truncated = state.step >= self.episode_length
        totals = self._drain(params, state, truncated)
        # The next episode may begin with the request at hand, which nothing has been done with; a trace starts anew.
        workload, _, request = params.workload.next(uniforms, params.workload.reset(key_reset))
        fresh = self._fresh(request, workload, slots=1)
        choose = lambda new, old: jnp.where(truncated, new, old)  # noqa: E731
        observation = jax.tree.map(choose, self._observe(params, fresh), final_observation)
        # Slots out of use may hold anything, so the counters are all of the queues that needs a reset.
        queues = {name: getattr(fresh.engines, name) for name in ("num_requests", "num_running", "clock")}
        fresh = fresh.replace(engines=state.engines.replace(**queues), slots=state.slots)
        state = jax.tree.map(choose, fresh, state)
        info = {
            "final_observation": final_observation,
            "qos": qos,
            "penalty": jnp.where(joined, penalty, 0),
            "episode": totals,
        }
        return observation, state, reward, jnp.bool_(False), truncated, info

    def queue_lengths(self, state: EnvState) -> jax.Array:
        """int32 [N]: requests running or waiting at each expert."""
        return state.engines.num_requests

    def _fresh(self, request: Request, workload: Any, slots: int | None = None) -> EnvState:
        shape = (self.num_experts, slots or self.slots)
        engine = empty_engine(shape[1])
        engines = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.num_experts, *leaf.shape)), engine)
        floats, integers = jnp.zeros(shape, float), jnp.zeros(shape, jnp.int32)
        return EnvState(
            engines=engines,
            slots=SlotPayload(floats, integers, floats, floats, integers),
            request=request,
            workload=workload,
            step=jnp.int32(0),
            totals=empty_totals(self.num_experts, self.metrics, self.episode_length),
        )

    def _observe(self, params: EnvParams, state: EnvState) -> Observation:
        observation = observe(params, state, self.queue_nodes)
        return flatten(observation) if self.obs == "flat" else observation

    def _penalty(self, params: EnvParams, state: EnvState, action: jax.Array) -> jax.Array:
        """The penalty of sending the arriving request to the chosen expert, float []."""
        if self.penalty == "off":
            return jnp.zeros((), float)
        expert = jnp.minimum(action, self.num_experts - 1)
        engine, slots, engine_params = jax.tree.map(
            lambda leaf: leaf[expert], (state.engines, state.slots, params.engines)
        )
        request = state.request
        lengths = request.output_tokens if self.penalty == "paper" else request.predicted_output_tokens
        queue = Queue(
            engine=engine,
            age=-slots.arrival,
            score=slots.score,
            predicted_score=slots.predicted_score,
            predicted_tokens=slots.predicted_tokens,
            prompt_tokens=request.prompt_tokens,
            output_tokens=lengths[expert],
        )
        if self.penalty == "paper":
            k1, k2 = params.penalty_prefill[expert], params.penalty_context[expert]
            return paper_impact(k1, k2, params.latency_limit, queue, engine.target_tokens)
        impact = exact_impact if self.penalty == "exact" else predicted_impact
        return impact(engine_params, params.latency_limit, queue)

    def _route(self, params: EnvParams, state: EnvState, action: jax.Array) -> tuple[EnvState, jax.Array]:
        """Appends the request to the chosen expert's queue, if it fits there; also whether it did, bool []."""
        request, engines = state.request, params.engines
        chosen = jnp.arange(self.num_experts) == action
        # simulation.md section 1, rule 8: what could never finish is rejected here, by its true length.
        length = jnp.minimum(request.prompt_tokens + request.output_tokens, engines.max_model_len)
        feasible = blocks_for(length - 1, engines.block_size) <= engines.usable_blocks
        whole = request.prompt_tokens + request.output_tokens - 1
        feasible &= engines.enable_chunked_prefill | (whole <= engines.max_num_batched_tokens)
        feasible &= request.prompt_tokens < engines.max_model_len
        free = state.engines.num_requests < self.slots
        joins = chosen & feasible & free

        target = target_tokens(request.prompt_tokens, request.output_tokens, engines.max_model_len)
        at_tail = joins[:, None] & (jnp.arange(self.slots) == state.engines.num_requests[:, None])
        put = lambda new, old: jnp.where(at_tail, new, old)  # noqa: E731
        slots = SlotPayload(
            arrival=put(0.0, state.slots.arrival),
            index=put(state.step, state.slots.index),
            score=put(request.score[:, None], state.slots.score),
            predicted_score=put(request.predicted_score[:, None], state.slots.predicted_score),
            predicted_tokens=put(request.predicted_output_tokens[:, None], state.slots.predicted_tokens),
        )
        queues = jax.vmap(append, (0, 0, None, 0, None))(
            state.engines, joins, request.prompt_tokens, target, jnp.zeros((), float)
        )
        totals = state.totals
        if totals is not None:
            totals = totals.replace(
                arrived=totals.arrived + 1,
                dropped=totals.dropped + ~jnp.any(chosen),
                rejected_infeasible=totals.rejected_infeasible + (chosen & ~feasible),
                rejected_full=totals.rejected_full + (chosen & feasible & ~free),
            )
        return state.replace(engines=queues, slots=slots, totals=totals, step=state.step + 1), jnp.any(joins)

    def _advance(self, params: EnvParams, state: EnvState, gap: jax.Array) -> tuple[EnvState, jax.Array]:
        """Runs all experts for `gap` seconds, which then is the present; also the QoS of what finished, float []."""
        state, qos = self._run(params, state, gap)
        engines, slots, totals = state.engines, state.slots, state.totals
        if totals is not None:
            totals = totals.replace(elapsed=totals.elapsed + gap)
        engines = engines.replace(clock=engines.clock - gap, first_token_time=engines.first_token_time - gap)
        return state.replace(engines=engines, slots=slots.replace(arrival=slots.arrival - gap), totals=totals), qos

    def _run(self, params: EnvParams, state: EnvState, until: jax.Array) -> tuple[EnvState, jax.Array]:
        """Runs every iteration that starts before `until` (s) and takes out what finished; also its QoS, float []."""
        engines, progress = jax.vmap(advance, (0, 0, None, None))(params.engines, state.engines, Progress.none(), until)
        totals = state.totals
        if totals is not None:
            totals = totals.replace(
                busy=totals.busy + progress.busy_time,
                block_seconds=totals.block_seconds + progress.block_seconds,
                kv_seconds=totals.kv_seconds + progress.block_seconds / params.engines.usable_blocks,
            )

        def take_one_each(carry: tuple[EngineState, SlotPayload, EpisodeTotals | None, jax.Array]):
            engines, slots, totals, qos = carry
            at = jax.vmap(first_finished)(engines)
            present = at < self.slots
            here = jnp.arange(self.slots) == at[:, None]
            pick = lambda leaf: jnp.sum(jnp.where(here, leaf, 0), axis=1, dtype=leaf.dtype)  # noqa: E731
            request = Completed(
                present=present,
                index=pick(slots.index),
                tokens=jnp.maximum(pick(engines.generated), 1),
                score=pick(slots.score),
                preemptions=pick(engines.preemptions),
                arrival=pick(slots.arrival),
                first_token=pick(engines.first_token_time),
                finish=pick(engines.finish_time),
            )
            if totals is not None:
                totals = add_completed(totals, self.metrics, request, params.latency_limit)
            engines, slots = jax.vmap(remove)(engines, slots, at)
            return engines, slots, totals, qos + jnp.sum(request.qos(params.latency_limit))

        def any_finished(carry: tuple[EngineState, SlotPayload, EpisodeTotals | None, jax.Array]) -> jax.Array:
            return jnp.any(jax.vmap(first_finished)(carry[0]) < self.slots)

        carry = (engines, state.slots, totals, jnp.zeros((), float))
        engines, slots, totals, qos = jax.lax.while_loop(any_finished, take_one_each, carry)
        return state.replace(engines=engines, slots=slots, totals=totals), qos

    def _drain(self, params: EnvParams, state: EnvState, truncated: jax.Array) -> EpisodeTotals | None:
        """The totals after the requests still open have run to their end, where `truncated`; else unchanged.

        A loop of at most one round, since under `vmap` a loop is left out where nobody needs it, and a branch is not.
        """
        if state.totals is None:
            return None

        def run(carry: tuple[jax.Array, EpisodeTotals]) -> tuple[jax.Array, EpisodeTotals]:
            drained, qos = self._run(params, state, jnp.asarray(AFTER_ALL, float))
            totals = drained.totals
            assert totals is not None  # as state.totals
            rest = jnp.maximum(jnp.max(drained.engines.clock), 0)
            totals = totals.replace(drained_qos=totals.drained_qos + qos, elapsed=totals.elapsed + rest)
            return jnp.bool_(False), totals

        return jax.lax.while_loop(lambda carry: carry[0], run, (truncated, state.totals))[1]
