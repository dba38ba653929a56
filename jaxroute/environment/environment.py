"""The routing environment: one step handles one arriving request, which the action sends to an expert or drops."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.affinity import SentRecord, empty_record
from jaxroute.environment.batching import batch_first, batch_last, in_own_modes, keep_batch_last, over_batch
from jaxroute.environment.metrics import empty_totals, totals_first, totals_last
from jaxroute.environment.settings import Settings
from jaxroute.environment.signals import require_counts
from jaxroute.environment.spaces import Discrete, Space, observation_space
from jaxroute.environment.state import EnvParams, EnvState, QueuedRequests, Scrape
from jaxroute.environment.step import Observation, drain, observe_batch, step
from jaxroute.environment.turns import Arrival
from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineState, empty_engine
from jaxroute.workload.request import Request

DYNAMICS_VERSION = 3
"""Version of what environments compute, independent of the package's version. Only results of equal versions can be
compared. A change of the observations, rewards or requests of a key increases it (tests/test_contract.py)."""

# Programs trace a step once for each `jax.vmap` around it. With this they share what is traced for equal shapes, in one
# program and with all others of the process; the programs are the same without it.
_traced_once = partial(jax.jit, static_argnums=0, inline=True)


@dataclass(frozen=True)
class RoutingEnvironment(Settings):
    """N experts behind a router. All fields are static; everything that a sweep may vary is in `EnvParams`.

    `reset` and `step` are pure functions of one environment, for `jax.jit` and `jax.vmap`. The requests depend only on
    the keys, never on actions: the same keys give the same requests to every router.
    """

    def action_space(self, params: EnvParams | None = None) -> Discrete:
        """The actions 0..N. `params` has no effect; gymnax's method has it."""
        del params
        return Discrete(self.num_actions)

    def observation_space(self, params: EnvParams | None = None) -> Space:
        """See `spaces.observation_space`. `params` has no effect; gymnax's method has it."""
        del params
        return observation_space(self)

    @in_own_modes
    def reset(self, key: jax.Array, params: EnvParams) -> tuple[Observation, EnvState]:
        """(observation, state) of a new episode at its first arrival, with idle experts."""
        key_start, key_request = jax.random.split(key)
        workload, _, request = params.workload.sample(key_request, params.workload.reset(key_start))
        if params.disturbances is not None:
            request = params.disturbances.with_quality(request, jnp.int32(0))
        shape = (self.slots, self.num_experts)
        floats, integers = jnp.zeros(shape, float), jnp.zeros(shape, jnp.int32)
        engines = empty_engine(self.slots, (self.num_experts,), params.engines)
        queued = QueuedRequests(floats, integers, floats, floats, integers)
        state = EnvState(
            engines=engines,
            queued=queued,
            request=request,
            workload=workload,
            step=jnp.int32(0),
            recent_gap=jnp.zeros((), float),
            recent_latency=jnp.zeros(self.num_experts, float),
            totals=empty_totals(self.num_experts, self.metrics, self.episode_length),
            scrape=self._first_scrape(engines, queued, params),
            sent=self._no_record(request, params),
        )
        # Each leaf is a buffer of its own, as in results of compiled programs, so that the state can be donated.
        return self.observe(state, params), jax.tree.map(jnp.copy, state)

    @in_own_modes
    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[Observation, EnvState, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Routes the arriving request by `action` (int32 [], 0..N) and runs the cluster to the next arrival.

        Action N drops the request, as does any number outside of 0..N.

        Returns (observation, state, reward, terminated, truncated, info). The reward, float [], is the QoS of the
        requests that finished since the last decision, less penalty_weight times the penalty. An episode is truncated
        after `episode_length` requests and never terminates; the returned observation and state are then those of the
        next episode.

        info has "final_observation", the observation at the next arrival before any reset; "qos", float [], the QoS in
        this step; "penalty", float []; "elapsed", float [], s to the next arrival; and "episode", the `EpisodeTotals`
        up to now (None with metrics off). If the episode is truncated, these are complete: requests that were still
        open have run to their end. Such requests count in the totals but in no reward.
        """
        key_arrival, key_reset = jax.random.split(key)
        uniforms = params.workload.draw(key_arrival)
        workload, gap, request = params.workload.next(uniforms, state.workload)
        # The next episode may begin with the request just drawn, which is unused; a trace restarts.
        first_workload, _, first_request = params.workload.next(uniforms, params.workload.reset(key_reset))
        if params.disturbances is not None:
            request = params.disturbances.with_quality(request, state.step + 1)
            first_request = params.disturbances.with_quality(first_request, jnp.int32(0))
        arrival, first = Arrival(gap, request, workload), Arrival(gap, first_request, first_workload)
        return over_batch(self._step)(
            state, jnp.asarray(action, jnp.int32), arrival, first, params.replace(workload=None)
        )

    @in_own_modes
    def observe(self, state: EnvState, params: EnvParams) -> Observation:
        """The observation of a state, equal to the one that `reset` or `step` returned with it."""
        return over_batch(self._observe)(state.replace(totals=None), params.replace(workload=None))

    @in_own_modes
    def drain(self, state: EnvState, params: EnvParams) -> jax.Array:
        """QoS, float [], of the requests at the experts if they run to their ends without further arrivals."""
        return over_batch(self._drain)(state.replace(totals=None), params.replace(workload=None))

    def queue_lengths(self, state: EnvState) -> jax.Array:
        """int32 [N]: number of requests running or waiting at each expert, as far as a router sees them."""
        return state.visible().engines.num_requests

    def _first_scrape(self, engines: EngineState, queued: QueuedRequests, params: EnvParams) -> Scrape | None:
        if self.signals == "counts":
            require_counts(params.engines)
        elif params.signal_delay is None:
            return None
        return Scrape(engines, queued, jnp.zeros((), float))

    def _no_record(self, request: Request, params: EnvParams) -> SentRecord | None:
        if self.prefix_share == "off":
            return None
        exact = self.prefix_share == "exact" and not params.engines.prefix_pieces
        if request.prefix is None or params.prefix_expiry is None or exact:
            raise UserError(
                f"prefix_share={self.prefix_share} needs requests with prefixes, as in chat-3, params.prefix_expiry"
                f"{' and engines with prefix_pieces' if exact else ''}; or set it to off"
            )
        return empty_record(self.prefix_record, request.prefix)

    @_traced_once
    def _observe(self, state: EnvState, params: EnvParams) -> Observation:
        """Like `observe`, with all leaves [B, ...]."""
        return observe_batch(self, batch_last(state), batch_last(params))

    def _drain(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Like `drain`, with all leaves [B, ...]."""
        return drain(batch_last(state), batch_last(params))

    @_traced_once
    def _step(self, state: EnvState, action: jax.Array, arrival: Arrival, first: Arrival, params: EnvParams):
        """Like `step`, with all leaves [B, ...]. `params` has no workload; `first` begins the next episode."""
        truncated = state.step + 1 >= self.episode_length
        params, totals = batch_last(params), totals_last(state.totals)
        before = batch_last(state.replace(totals=None)).replace(totals=totals)
        outcome = step(self, before, action, batch_last(arrival), batch_last(first), params)
        totals = totals_first(outcome.state.totals)
        state = batch_first(outcome.state.replace(totals=None)).replace(totals=totals)
        state = state.replace(
            engines=jax.tree.map(keep_batch_last, state.engines), queued=jax.tree.map(keep_batch_last, state.queued)
        )
        info = {
            "final_observation": outcome.final_observation,
            "qos": outcome.qos,
            "penalty": outcome.penalty,
            "elapsed": arrival.gap,
            "episode": totals,
        }
        reward = outcome.credit - params.penalty_weight * outcome.penalty
        return outcome.observation, state, reward, jnp.zeros_like(truncated), truncated, info
