"""Parameters and state of the routing environment, as pytrees."""

from __future__ import annotations

import jax
from flax import struct

from jaxroute.environment.disturbances import Disturbances
from jaxroute.environment.metrics import EpisodeTotals
from jaxroute.simulator.engine import EngineParams, EngineState
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request
from jaxroute.workload.workload import Workload

RECENT_GAPS = 32
"""An exponential mean of gaps: each has a weight of 1 / 32, the first 32 of an episode their plain mean."""

RECENT_COMPLETIONS = 10
"""An exponential mean of an expert's completions, which stands for LiteLLM's list of the last ten: each has a weight of
1 / 10, but the first ones the whole. Several in one step count as that many of their mean latency."""


class EnvParams(struct.PyTreeNode):
    """What a sweep may vary: every leaf is traced, so it may carry a batch axis for `jax.vmap`."""

    workload: Workload  # arrivals and requests
    engines: EngineParams  # each field [N]
    latency_limit: jax.Array  # float [], L, s per output token: a request counts iff it stays below
    penalty_weight: jax.Array  # float [], w
    penalty_prefill: jax.Array  # float [N], k1 of the paper's penalty, s per prompt token
    penalty_context: jax.Array  # float [N], k2 of the paper's penalty, s per context token
    token_scale: jax.Array  # float [], tokens that count as 1 in observations
    # float [], per s: the reward counts a request's QoS over this to the power of its age, so that to a learner with
    # this discount it is worth its QoS at its arrival. None: as it is
    credit_discount: jax.Array | None = None
    disturbances: Disturbances | None = None  # what changes while an episode runs; None: nothing does

    def at(self, decision: jax.Array) -> EnvParams:
        """The parameters between `decision` (int32 [], or [B] where environments are last) and the next one."""
        if self.disturbances is None:
            return self
        latency = self.disturbances.slowed(self.engines.latency, decision)
        return self.replace(engines=self.engines.replace(latency=latency))


class QueuedRequests(struct.PyTreeNode):
    """What the environment knows of the request in each slot, beyond the engine's own state; each field [S, N]."""

    arrival: jax.Array  # float, s relative to the present, <= 0
    index: jax.Array  # int32, number of the request in the episode
    score: jax.Array  # float, true
    predicted_score: jax.Array  # float
    predicted_tokens: jax.Array  # int32, predicted output


class EnvState(struct.PyTreeNode):
    """One environment at a decision. Times are relative to it; randomness comes in with each step's key."""

    engines: EngineState  # each field [N] or [S, N]; every iteration that has started is accounted as done
    queued: QueuedRequests
    request: Request  # the arriving one
    workload: WorkloadState
    step: jax.Array  # int32 [], decisions taken in the episode
    recent_gap: jax.Array  # float [], s between arrivals, see `RECENT_GAPS`; 0 at an episode's first
    recent_latency: jax.Array  # float [N], s per token, see `RECENT_COMPLETIONS`; 0 before the first
    totals: EpisodeTotals | None  # of the episode so far, at its first decision still the last one's; None: metrics off
