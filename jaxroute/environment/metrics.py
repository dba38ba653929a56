"""Metrics of an episode: sums that every step adds to, and the metrics computed from them at the end.

The sums are additive over episodes and environments. A percentile is interpolated linearly between two requests, as
NumPy does by default: from the values of every request ("exact"), or from a histogram whose bins are 4 % wide
("histogram"), which is at most 2 % off if both requests are between 1 ms and 3,400 s. "off" keeps nothing.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxroute.environment.batching import batch_first, batch_last, in_own_modes
from jaxroute.environment.qos import QosRule
from jaxroute.simulator.advance import EngineWork
from jaxroute.simulator.engine import LARGE, lowest, slot_positions, total

Level = Literal["off", "histogram", "exact"]

TIMINGS = ("latency_per_token", "ttft", "tpot")
"""Seconds: (finish - arrival) / output tokens; first token - arrival; (finish - first token) / (output tokens - 1)."""

_SMALLEST, _RATIO, _BINS = 1e-3, 1.04, 384  # bins from 1 ms to 3,400 s; the first and last also have values outside


class EpisodeTotals(struct.PyTreeNode):
    """Sums over an episode's requests and time. Float32 counts are exact: an episode has fewer than 2**24 requests."""

    arrived: jax.Array  # float []
    dropped: jax.Array  # float []
    rejected_full: jax.Array  # float [N], the expert had no free slot
    rejected_infeasible: jax.Array  # float [N], the expert could never serve it
    abandoned: jax.Array  # float [N], the client gave up
    completed: jax.Array  # float [N]
    qos: jax.Array  # float [N], sum over completed requests, less their cost
    cost: jax.Array  # float [N], sum over completed requests
    drained_qos: jax.Array  # float [], the part of `qos` after the last step
    score: jax.Array  # float [N], sum over completed requests, whether they met the limit or not
    violations: jax.Array  # float [N], completed requests that missed their limit
    preemptions: jax.Array  # float [N], of completed requests
    timings: jax.Array  # float [3, N], sums of TIMINGS over completed requests (tpot: with two or more tokens)
    several_tokens: jax.Array  # float [N], completed requests with two or more tokens
    elapsed: jax.Array  # float [], s of simulated time until all requests of the episode have ended
    busy: jax.Array  # float [N], s of iterations
    block_seconds: jax.Array  # float [N], KV blocks held times s
    kv_seconds: jax.Array  # float [N], share of the KV cache held times s
    timing_record: jax.Array  # float [3, bins] counts of TIMINGS; "exact": float [3, episode length], NaN if none


class Completed(struct.PyTreeNode):
    """Completed requests in the S slots of N experts in B environments; every field [S, N, B]."""

    served: jax.Array  # bool; if False, the other fields have no meaning, but tokens is above 0
    index: jax.Array  # int32, number of the request in the episode
    tokens: jax.Array  # int32, output
    score: jax.Array  # float, true
    preemptions: jax.Array  # int32
    arrival: jax.Array  # float, s; this and the next two have the same origin
    first_token: jax.Array  # float
    finish: jax.Array  # float

    def met(self, rule: QosRule) -> jax.Array:
        """bool [S, N, B]: the request was served within its limit."""
        ttft, latency = self.first_token - self.arrival, self.finish - self.arrival
        return self.served & rule.met(ttft, latency, self.tokens)

    def qos(self, rule: QosRule) -> jax.Array:
        """float [S, N, B]: the score if the limit is met, else 0; less the cost (simulation.md section 4)."""
        return jnp.where(self.met(rule), self.score, 0) - jnp.where(self.served, rule.cost(self.tokens), 0)


def empty_totals(num_experts: int, level: Level, episode_length: int) -> EpisodeTotals | None:
    """Totals at the beginning of an episode; None with metrics off."""
    if level == "off":
        return None
    one, each = jnp.zeros((), float), jnp.zeros(num_experts, float)
    # Only "exact" has a NaN, so that `jax_debug_nans` can be used without it.
    record = jnp.full((3, episode_length), jnp.nan, float) if level == "exact" else jnp.zeros((3, _BINS), float)
    return EpisodeTotals(
        arrived=one,
        dropped=one,
        rejected_full=each,
        rejected_infeasible=each,
        abandoned=each,
        completed=each,
        qos=each,
        cost=each,
        drained_qos=one,
        score=each,
        violations=each,
        preemptions=each,
        timings=jnp.zeros((3, num_experts), float),
        several_tokens=each,
        elapsed=one,
        busy=each,
        block_seconds=each,
        kv_seconds=each,
        timing_record=record,
    )


def totals_last(totals: EpisodeTotals | None) -> EpisodeTotals | None:
    """Moves environments from the first to the last axis, except in the record, which is written in few places."""
    if totals is None:
        return None
    return batch_last(totals.replace(timing_record=None)).replace(timing_record=totals.timing_record)


def totals_first(totals: EpisodeTotals | None) -> EpisodeTotals | None:
    """The inverse of `totals_last`."""
    if totals is None:
        return None
    return batch_first(totals.replace(timing_record=None)).replace(timing_record=totals.timing_record)


def add_work(totals: EpisodeTotals, work: EngineWork, usable_blocks: jax.Array) -> EpisodeTotals:
    """Adds to the totals the work of the engines."""
    return totals.replace(
        busy=totals.busy + work.busy_time,
        block_seconds=totals.block_seconds + work.block_seconds,
        kv_seconds=totals.kv_seconds + work.block_seconds / usable_blocks,
    )


def add_completed(totals: EpisodeTotals, level: Level, completed: Completed, rule: QosRule) -> EpisodeTotals:
    """Adds the completed requests to the totals; both have environments last (`totals_last`)."""
    several = completed.served & (completed.tokens > 1)
    latency = (completed.finish - completed.arrival) / completed.tokens
    ttft = completed.first_token - completed.arrival
    tpot = (completed.finish - completed.first_token) / jnp.maximum(completed.tokens - 1, 1)
    timings = [jnp.where(completed.served, latency, 0), jnp.where(completed.served, ttft, 0)]
    timings.append(jnp.where(several, tpot, 0))
    sum_of = lambda values: total(jnp.where(completed.served, values, 0))  # noqa: E731
    return totals.replace(
        completed=totals.completed + total(completed.served),
        qos=totals.qos + total(completed.qos(rule)),
        cost=totals.cost + sum_of(rule.cost(completed.tokens)),
        score=totals.score + sum_of(completed.score),
        violations=totals.violations + total(completed.served & ~completed.met(rule)),
        preemptions=totals.preemptions + sum_of(completed.preemptions),
        timings=totals.timings + jnp.stack([total(timing) for timing in timings]),
        several_tokens=totals.several_tokens + total(several),
        timing_record=_record(totals.timing_record, level, timings, completed, several),
    )


def _record(
    record: jax.Array, level: Level, timings: list[jax.Array], completed: Completed, several: jax.Array
) -> jax.Array:
    """Writes the TIMINGS of the completed requests, each [S, N, B], into the record [B, 3, bins], or with "exact"
    [B, 3, episode length]; TPOT only for requests with `several` tokens. Each round writes one request per expert."""
    position = slot_positions(completed.served)
    size = record.shape[-1]
    environment, row = jnp.arange(record.shape[0]), jnp.arange(3)[:, None, None]

    def write_one_each(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        record, left = carry
        here = left & (position == lowest(jnp.where(left, position, LARGE)))
        pick = lambda values: total(jnp.where(here, values, 0))  # noqa: E731
        one = total(here) > 0
        found = jnp.stack([one, one, total(here & several) > 0])
        values = jnp.stack([pick(timing) for timing in timings])
        if level == "exact":
            column = jnp.where(found, pick(completed.index), size)
            record = record.at[environment, row, column].set(values, mode="drop")
        else:
            floor = jnp.floor(jnp.log(jnp.maximum(values, _SMALLEST) / _SMALLEST) / np.log(_RATIO))
            column = jnp.where(found, jnp.minimum(floor, size - 1).astype(jnp.int32), size)
            record = record.at[environment, row, column].add(1.0, mode="drop")
        return record, left & ~here

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), write_one_each, (record, completed.served))[0]


def _percentiles(totals: EpisodeTotals, level: Level) -> jax.Array:
    """[3 timings, 3]: p50, p95 and p99; NaN if no request completed."""
    quantiles = jnp.asarray([0.5, 0.95, 0.99])
    if level == "exact":
        return jnp.nanquantile(totals.timing_record, quantiles, axis=1).T
    cumulative = jnp.cumsum(totals.timing_record, axis=1)
    count = cumulative[:, -1:]
    rank = quantiles * jnp.maximum(count - 1, 0)  # of the requests in order from 0, [3, 3]
    lower = jnp.floor(rank)

    def value(rank: jax.Array) -> jax.Array:
        bins = jnp.sum(cumulative[:, None, :] <= rank[:, :, None], axis=2)
        return _SMALLEST * jnp.exp((bins + 0.5) * np.log(_RATIO))

    above = rank - lower
    values = value(lower) * (1 - above) + value(jnp.ceil(rank)) * above
    return jnp.where(count > 0, values, jnp.nan)


@in_own_modes
def summarize(totals: EpisodeTotals, level: Level) -> dict[str, jax.Array]:
    """Metrics of an episode (or of the sum of several, with "histogram"), float []; `expert_...` float [N].

    `qos` and `cost` are means over all arrived requests, and the rates of drops and rejections are shares of them.
    `goodput` is the number of requests per second of simulated time that met their limit. `score`,
    timings and `violation_rate` are over completed requests. `utilization` and `kv_use` are shares of the simulated
    time. The `qos` and rejection rate of an expert are over the requests routed to it. Percentiles are for the whole
    cluster. A value is NaN if there is nothing to average.
    """
    completed = jnp.sum(totals.completed)
    several = jnp.sum(totals.several_tokens)
    experts = totals.completed.shape[-1]
    busy = jnp.sum(totals.busy)
    rejected = totals.rejected_full + totals.rejected_infeasible
    routed = totals.completed + rejected + totals.abandoned  # to each expert
    percentiles = _percentiles(totals, level)
    counts = jnp.stack([completed, completed, several])
    means = jnp.sum(totals.timings, axis=1) / counts
    timings = {}
    for row, name in enumerate(TIMINGS):
        timings[name] = means[row]
        for column, quantile in enumerate(("p50", "p95", "p99")):
            timings[f"{name}_{quantile}"] = percentiles[row, column]
    return {
        "qos": jnp.sum(totals.qos) / totals.arrived,
        "goodput": (completed - jnp.sum(totals.violations)) / totals.elapsed,
        "cost": jnp.sum(totals.cost) / totals.arrived,
        "score": jnp.sum(totals.score) / completed,
        **timings,
        "violation_rate": jnp.sum(totals.violations) / completed,
        "drop_rate": totals.dropped / totals.arrived,
        "rejection_rate": jnp.sum(rejected) / totals.arrived,
        "abandon_rate": jnp.sum(totals.abandoned) / totals.arrived,
        "full_rejection_rate": jnp.sum(totals.rejected_full) / totals.arrived,
        "preemptions": jnp.sum(totals.preemptions),
        "utilization": busy / experts / totals.elapsed,
        "kv_use": jnp.sum(totals.kv_seconds) / experts / totals.elapsed,
        "qos_per_busy_second": jnp.sum(totals.qos) / busy,
        "qos_per_block_second": jnp.sum(totals.qos) / jnp.sum(totals.block_seconds),
        "expert_share": routed / totals.arrived,
        "expert_qos": totals.qos / routed,
        "expert_score": totals.score / totals.completed,
        "expert_latency_per_token": totals.timings[0] / totals.completed,
        "expert_ttft": totals.timings[1] / totals.completed,
        "expert_tpot": totals.timings[2] / totals.several_tokens,
        "expert_violation_rate": totals.violations / totals.completed,
        "expert_rejection_rate": rejected / routed,
        "expert_preemptions": totals.preemptions,
        "expert_utilization": totals.busy / totals.elapsed,
        "expert_kv_use": totals.kv_seconds / totals.elapsed,
        "expert_qos_per_busy_second": totals.qos / totals.busy,
        "expert_qos_per_block_second": totals.qos / totals.block_seconds,
    }
