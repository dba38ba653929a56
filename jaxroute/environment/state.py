"""Parameters and state of the routing environment, as pytrees."""

from __future__ import annotations

import jax
from flax import struct

from jaxroute.environment.metrics import EpisodeTotals
from jaxroute.simulator.engine import EngineParams, EngineState
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request
from jaxroute.workload.workload import Workload


class EnvParams(struct.PyTreeNode):
    """What a sweep may vary: every leaf is traced, so it may carry a batch axis for `jax.vmap`."""

    workload: Workload  # arrivals and requests
    engines: EngineParams  # each field [N]
    latency_limit: jax.Array  # float [], L, s per output token: a request counts iff it stays below
    penalty_weight: jax.Array  # float [], w
    penalty_prefill: jax.Array  # float [N], k1 of the paper's penalty, s per prompt token
    penalty_context: jax.Array  # float [N], k2 of the paper's penalty, s per context token
    token_scale: jax.Array  # float [], tokens that count as 1 in observations


class SlotPayload(struct.PyTreeNode):
    """What the environment knows of the request in each slot, beyond the engine's own state; each field [S, N]."""

    arrival: jax.Array  # float, s relative to the present, <= 0
    index: jax.Array  # int32, number of the request in the episode
    score: jax.Array  # float, true
    predicted_score: jax.Array  # float
    predicted_tokens: jax.Array  # int32, predicted output


class EnvState(struct.PyTreeNode):
    """One environment at a decision. Times are relative to it; randomness comes in with each step's key."""

    engines: EngineState  # each field [N] or [S, N]; every iteration that has started is accounted as done
    slots: SlotPayload
    request: Request  # the arriving one
    workload: WorkloadState
    step: jax.Array  # int32 [], decisions taken in the episode
    totals: EpisodeTotals | None  # of the episode so far, at its first decision still the last one's; None: metrics off
