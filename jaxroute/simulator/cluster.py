"""The loop of a simulated cluster: route a request, run the engines to an instant, collect what finished, shift time.

The environment, the timeline, `replay`, calibration and the planning routers are made of these functions, and of
`advance.jump` where they go on one jump at a time. Only `environment.impact` calls `slots.append` itself, since it cuts
the length of a request that it imagines.

A cluster consists of engines along trailing axes (`engine`) and a payload. The payload is any pytree of arrays [S, ...]
with what the caller stores about the request in each slot; it moves with the slots.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.advance import EngineWork, Jump, advance, cache_rules
from jaxroute.simulator.advance_kernel import advance_engines
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import (
    IGNORED,
    LARGE,
    EngineParams,
    EngineState,
    SharedBlocks,
    Tree,
    target_tokens,
    total,
)
from jaxroute.simulator.prefix_runs import free_blocks, path_of
from jaxroute.simulator.slots import append, remove
from jaxroute.workload.request import Prefix

AFTER_ALL = 1e30
"""s, later than any event: engines that run until then finish all requests."""


class Admission(struct.PyTreeNode):
    """Whether a request was admitted by the engines it was sent to; every field bool [...]."""

    joined: jax.Array
    infeasible: jax.Array  # rejected: the engine could never finish it (rule 8, with its true length)
    full: jax.Array  # rejected: no slot is free


class Finished(struct.PyTreeNode):
    """The requests that were removed, in the slots that they had."""

    engines: EngineState
    payload: Any  # each leaf [S, ...]
    served: jax.Array  # bool [S, ...], the request has all of its tokens; other slots are not among the finished
    ignored: jax.Array  # int32 [...], requests that can never fit, which vllm_v0 drops; or those that `abort` ended


def route(
    engines: EngineState,
    payload: Tree,
    chosen: jax.Array,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    request: Tree,
    params: EngineParams,
    prefix: Prefix | None = None,
) -> tuple[EngineState, Tree, Admission]:
    """Sends a request to the `chosen` engines (bool [...]); it joins those that can finish it and have a free slot.

    `request` is its payload: a tree like `payload`, with leaves that broadcast to [...]. It ends by a stop token.
    `prefix` is what it shares with others, [K, ...], if the engines have `prefix_pieces`.
    """
    can_finish = rules(params).can_serve(prompt_tokens, output_tokens, params)
    free = engines.num_requests < engines.num_slots
    admission = Admission(
        joined=chosen & can_finish & free, infeasible=chosen & ~can_finish, full=chosen & can_finish & ~free
    )
    now = jnp.zeros((), float)
    lengths = prompt_tokens, output_tokens
    engines, payload = join(engines, payload, admission.joined, *lengths, request, now, params, True, prefix)
    return engines, payload, admission


def join(
    engines: EngineState,
    payload: Tree,
    joins: jax.Array,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    request: Tree,
    at: jax.Array,
    params: EngineParams,
    stop_token: jax.Array | bool = False,
    prefix: Prefix | None = None,
) -> tuple[EngineState, Tree]:
    """Puts a request at the tail of `waiting` at time `at` (s) where `joins` (bool [...]), which need a free slot.

    Unlike `route`, it checks nothing: a request that can never finish stalls its engine, as in vLLM. `stop_token`: the
    request ends by a stop token, which asynchronous scheduling does not know ahead. `prefix` is that of `route`.
    """
    here = joins & (engines.position == engines.num_requests)
    payload = jax.tree.map(lambda old, new: jnp.where(here, new, old), payload, request)
    target = target_tokens(prompt_tokens, output_tokens, rules(params).longest(params))
    known_end = ~jnp.asarray(stop_token) | (prompt_tokens + target >= rules(params).longest(params))
    path = None if prefix is None or not params.prefix_pieces else path_of(prefix, params)
    return append(engines, joins, prompt_tokens, target, at, known_end, path), payload


def run_until(
    engines: EngineState,
    until: jax.Array,
    params: EngineParams,
    work: EngineWork | None = None,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
    on_jump: Callable[[Any, Jump], Any] | None = None,
    seen: Any = None,
) -> tuple[EngineState, EngineWork, Any]:
    """Runs every iteration that starts before `until` (float [...], s), with the bounds of `advance`.

    Returns the engines, the work done (added to `work`), and the last value of `seen`, which becomes
    `on_jump(seen, jump)` after every round. Without an observer, an NVIDIA GPU runs the kernel instead of the loop.
    """
    work = EngineWork.none(engines.clock.shape) if work is None else work
    bounds = (until, params, most_iterations, stall_iterations)
    if on_jump is None:
        return (*advance_engines(engines, work, *bounds), seen)
    return advance(engines, work, *bounds, on_jump, seen)


def abort(engines: EngineState, leaves: jax.Array, params: EngineParams) -> EngineState:
    """Ends the requests `leaves` (bool [S, ...]) before the next iteration, and frees their blocks, as vLLM does when a
    client disconnects. They are then finished without being served. For vllm_v1.
    """
    cache = engines.cache
    if cache is not None:
        running = leaves & (engines.position < engines.num_running)
        cache = cache_rules(cache).after_abort(engines, cache, running, params)
    return engines.replace(finish_time=jnp.where(leaves, IGNORED, engines.finish_time), cache=cache)


def collect(
    engines: EngineState, payload: Tree, params: EngineParams, aborts: bool = False
) -> tuple[EngineState, Tree, Finished]:
    """Removes the requests that the engines have finished; the others keep their order.

    `aborts`: there may be requests that `abort` ended.
    """
    done = rules(params).finished(engines, params)
    served, ignored = done, jnp.zeros_like(engines.num_requests)
    if rules(params).ignores or aborts:
        served = done & (engines.finish_time > IGNORED)
        ignored = total(done & ~served)
    finished = Finished(engines, payload, served, ignored)
    engines, payload = remove(engines, payload, done)
    return engines, payload, finished


def restart(engines: EngineState, begins: jax.Array) -> EngineState:
    """Idle engines at time 0 where `begins` (bool [...]): as after their creation, when no block has content."""
    flight, cache = engines.flight, engines.cache
    if isinstance(cache, SharedBlocks):
        bounds = cache.runs.bounds
        blank = jnp.where(begins, free_blocks(cache), cache.blank)
        cache = cache.replace(blank=blank, runs=cache.runs.replace(bounds=jnp.where(begins, 0, bounds)))
    if flight is not None:
        flight = flight.replace(duration=jnp.where(begins, 0, flight.duration))
    return engines.replace(clock=jnp.where(begins, 0, engines.clock), flight=flight, cache=cache)


def shift_time(engines: EngineState, by: jax.Array, params: EngineParams) -> EngineState:
    """Moves the origin of all times forward by `by` s (float [...])."""
    engines = engines.replace(clock=engines.clock - by, first_token_time=engines.first_token_time - by)
    if rules(params).finished_stay:
        engines = engines.replace(finish_time=engines.finish_time - by)
    return engines
