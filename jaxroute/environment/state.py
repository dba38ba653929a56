"""Parameters and state of the routing environment, as pytrees."""

from __future__ import annotations

import jax
from flax import struct

from jaxroute.environment.affinity import SentRecord
from jaxroute.environment.disturbances import Disturbances
from jaxroute.environment.metrics import EpisodeTotals
from jaxroute.environment.qos import QosRule
from jaxroute.simulator.engine import EngineParams, EngineState
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request
from jaxroute.workload.workload import Workload

RECENT_GAPS = 32
"""Length of the exponential mean of gaps: a new gap has a weight of 1 / 32. Up to 32 gaps have their plain mean."""

RECENT_COMPLETIONS = 10
"""Length of the exponential mean of an expert's completions, which replaces LiteLLM's list of the last ten: each has a
weight of 1 / 10, except that the first completions set the mean. Several completions in one step count with their mean
latency."""


class EnvParams(struct.PyTreeNode):
    """Everything that a sweep may vary: each leaf is traced, so it may have a batch axis for `jax.vmap`."""

    workload: Workload  # arrivals and requests
    engines: EngineParams  # each field [N]
    latency_limit: jax.Array  # float [], L, s per output token: a request has QoS iff its latency is below
    penalty_weight: jax.Array  # float [], w
    penalty_prefill: jax.Array  # float [N], k1 of the paper's penalty, s per prompt token
    penalty_context: jax.Array  # float [N], k2 of the paper's penalty, s per context token
    token_scale: jax.Array  # float [], tokens that count as 1 in observations
    # float [], per s: the reward divides a request's QoS by this to the power of its age in s, so that to a learner
    # with this discount the request is worth its QoS at its arrival. None: no division
    credit_discount: jax.Array | None = None
    disturbances: Disturbances | None = None  # changes during an episode; None: no changes
    # Limits on TTFT and TPOT, float [], s: both, and they take the place of `latency_limit`; None: it applies
    ttft_limit: jax.Array | None = None
    tpot_limit: jax.Array | None = None
    token_price: jax.Array | None = None  # float [N], QoS that 1,000 output tokens of each expert cost; None: nothing
    # float [], s after which a client gives up: its request is cancelled, and has no QoS. None: nobody does
    patience: jax.Array | None = None
    # float [], s: a router sees the engines as they were at the last scrape, and a scrape is made at the first decision
    # at which the last one is at least that old. None: at every decision
    signal_delay: jax.Array | None = None
    # float [], s for which the router counts on what it sent to an expert; None: prompts share nothing
    prefix_expiry: jax.Array | None = None

    @property
    def qos_rule(self) -> QosRule:
        """What the answers are worth."""
        return QosRule(self.latency_limit, self.ttft_limit, self.tpot_limit, self.token_price)

    def at(self, decision: jax.Array) -> EnvParams:
        """The parameters between `decision` (int32 [], or [B] with environments last) and the next decision."""
        if self.disturbances is None:
            return self
        latency = self.disturbances.slowed(self.engines.latency, decision)
        return self.replace(engines=self.engines.replace(latency=latency))


class QueuedRequests(struct.PyTreeNode):
    """The environment's data of the request in each slot, in addition to the engine's; each field [S, N]."""

    arrival: jax.Array  # float, s relative to the current decision, <= 0
    index: jax.Array  # int32, number of the request in the episode
    score: jax.Array  # float, true
    predicted_score: jax.Array  # float
    predicted_tokens: jax.Array  # int32, predicted output tokens


class Scrape(struct.PyTreeNode):
    """The engines and their requests as a router last saw them; times are relative to the decision of the scrape."""

    engines: EngineState
    queued: QueuedRequests
    age: jax.Array  # float [], s


class EnvState(struct.PyTreeNode):
    """One environment at a decision. Times are relative to the decision; random numbers come from the key of a step."""

    engines: EngineState  # each field [N] or [S, N]; every started iteration counts as finished
    queued: QueuedRequests
    request: Request  # the arriving request
    workload: WorkloadState
    step: jax.Array  # int32 [], decisions taken in the episode
    recent_gap: jax.Array  # float [], s between arrivals, see `RECENT_GAPS`; 0 at the first arrival of an episode
    recent_latency: jax.Array  # float [N], s per token, see `RECENT_COMPLETIONS`; 0 before the first completion
    # totals of the episode up to now; at its first decision, those of the previous episode; None: metrics off
    totals: EpisodeTotals | None
    scrape: Scrape | None = None  # with `EnvParams.signal_delay`
    sent: SentRecord | None = None  # what the router remembers, with `prefix_share`

    def visible(self) -> EnvState:
        """The state in which the engines are as a router sees them."""
        scrape = self.scrape
        return self if scrape is None else self.replace(engines=scrape.engines, queued=scrape.queued)
