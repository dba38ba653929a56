"""Collects one episode under one router: the fate of every request, and every iteration of every engine.

The environment jumps over iterations and does not store finished requests. It therefore runs once, for its assignments
and totals. Its engines then run again on these assignments by the same jumps, which are recorded (`record`): each is
one iteration and the run of decodes after it, whose times have a closed form.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.disturbances import FAILED, Disturbances
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import as_pytree
from jaxroute.routers.choice import Router
from jaxroute.timelines.record import Log, Pieces, Results, Routed, replay, run_episode

MET, MISSED, DROPPED, REJECTED = range(4)
FATES = ("met", "missed", "dropped", "rejected")
"""Fates of a request: served with a latency per token below the limit, or above; dropped by the router; rejected by its
expert, which was full or could never serve it."""


class Requests(NamedTuple):
    """The T requests of an episode; every field is a NumPy array [T]. Times are s since the episode's beginning."""

    arrival: np.ndarray  # float64
    expert: np.ndarray  # int, chosen expert; -1: dropped
    fate: np.ndarray  # int, index of `FATES`
    admitted: np.ndarray  # float64, start of its first iteration; this and the next two: NaN if not served
    first_token: np.ndarray  # float64
    finish: np.ndarray  # float64
    latency_per_token: np.ndarray  # float, s
    preemptions: np.ndarray  # int
    prompt_tokens: np.ndarray  # int
    output_tokens: np.ndarray  # int, generated; 0 if not served
    score: np.ndarray  # float, of its expert's answer; 0 if dropped


class Disturbed(NamedTuple):
    """A part of an episode in which an expert is slower, hangs, or has answers of another quality."""

    expert: int
    start: float  # s since the episode's beginning, as is the next
    end: float
    label: str


class Episode(NamedTuple):
    """The data of an episode's pictures."""

    label: str  # of the router
    experts: tuple[str, ...]
    usable_blocks: np.ndarray  # int [N], KV blocks of each engine
    latency_limit: float  # s per output token
    requests: Requests
    pieces: Pieces
    metrics: dict[str, np.ndarray]  # of this episode, from the environment (`metrics.summarize`)
    disturbed: tuple[Disturbed, ...]

    @property
    def end(self) -> float:
        """Seconds from the beginning to the last event."""
        ends = [self.requests.arrival.max(), self.pieces.end.max(initial=0)]
        return float(max(ends))


def collect(
    env: RoutingEnvironment, params: EnvParams, routers: Mapping[str, Router], experts: tuple[str, ...], key: jax.Array
) -> list[Episode]:
    """One episode under each of `routers` (by label), the same as in `evaluate_routers` with this key.

    `experts` are N names.
    """
    require_drawable(params)
    # The penalty is part only of the reward, which is not shown.
    env = dataclasses.replace(env, metrics="exact", penalty="off")
    policies = [as_pytree(router) for router in routers.values()]
    episodes = []
    for index, label in enumerate(routers):
        routed, metrics = run_episode(env, policies, jnp.int32(index), key, params)
        log, results = jax.device_get(replay(env, routed, params.replace(workload=None)))
        routed, metrics = jax.device_get((routed, metrics))
        arrival = np.concatenate([[0.0], np.cumsum(routed.gap, dtype=np.float64)])
        requests, pieces = _requests(routed, results, arrival[:-1], len(experts)), episode_pieces(log, arrival)
        usable = np.asarray(params.engines.usable_blocks)
        limit = float(params.latency_limit)
        episode = Episode(label, experts, usable, limit, requests, pieces, metrics, ())
        episodes.append(episode._replace(disturbed=_disturbed(params.disturbances, arrival, episode.end)))
    return episodes


def require_drawable(params: EnvParams) -> None:
    """Raises `UserError` for a form of QoS that timelines do not show."""
    if params.patience is not None or params.ttft_limit is not None:
        raise UserError(
            "a timeline shows limits on the latency per token alone; leave patience, ttft_limit and tpot_limit out"
        )


def _disturbed(disturbances: Disturbances | None, arrival: np.ndarray, end: float) -> tuple[Disturbed, ...]:
    if disturbances is None:
        return ()
    starts, slowness, quality = (np.asarray(table) for table in jax.tree.leaves(disturbances))
    # A change happens at the arrival of its first decision, also one that comes after the last request.
    times = np.minimum(np.append(arrival, end)[np.minimum(np.append(starts, len(arrival)), len(arrival))], end)
    found = []
    for piece, expert in np.argwhere((slowness != 1) | (quality != 1)):
        slow, good = slowness[piece, expert], quality[piece, expert]
        labels = [f"iterations take {slow:.3g} times as long"] if slow != 1 else []
        if slow >= FAILED:
            labels = ["hangs"]
        if good != 1:
            labels.append(f"scores times {good:.3g}")
        if times[piece] < times[piece + 1]:
            span = float(times[piece]), float(times[piece + 1])
            found.append(Disturbed(int(expert), *span, ", ".join(labels)))
    return tuple(found)


def _requests(routed: Routed, results: Results, arrival: np.ndarray, num_experts: int) -> Requests:
    action = np.asarray(routed.action)
    expert = np.where((action >= 0) & (action < num_experts), action, -1)
    served = np.isfinite(results.latency)
    fate = np.where(expert < 0, DROPPED, np.where(~served, REJECTED, np.where(results.met, MET, MISSED)))
    score = np.asarray(routed.request.score)[np.arange(len(expert)), np.maximum(expert, 0)]
    return Requests(
        arrival=arrival,
        expert=expert,
        fate=fate,
        admitted=arrival + results.admitted,
        first_token=arrival + results.first_token,
        finish=arrival + results.latency,
        latency_per_token=np.asarray(results.latency) / np.maximum(results.tokens, 1),
        preemptions=np.asarray(results.preemptions),
        prompt_tokens=np.asarray(routed.request.prompt_tokens),
        output_tokens=np.asarray(results.tokens),
        score=np.where(expert < 0, 0, score),
    )


def episode_pieces(log: Log, arrival: np.ndarray) -> Pieces:
    """The pieces of the jumps by expert and time: an iteration each, and a run of decodes if there was one."""
    jumps = jax.tree.map(lambda field: field[: log.count].T, log.jumps)
    both = Pieces(*(np.stack(fields, axis=-1) for fields in zip(jumps.iteration, jumps.run, strict=True)))
    happened = jumps.took_place[..., None] & (both.iterations > 0)  # [N, rows, 2]
    decision = np.broadcast_to(arrival[jumps.index][..., None], happened.shape)[happened]
    pieces = Pieces(*(field[happened] for field in both))
    return pieces._replace(start=decision + pieces.start, end=decision + pieces.end)
