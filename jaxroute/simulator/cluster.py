"""The loop of a simulated cluster: route a request, run the engines to an instant, collect what finished, shift time.

The environment, the timeline, `replay`, calibration and the planning routers are all made of these functions; none of
them moves a queue by itself. A cluster is engines along trailing axes (`engine`), and a payload: any pytree of arrays
[S, ...] of what the caller knows of the request in each slot, which moves along with the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.advance import EngineWork, Jump, advance
from jaxroute.simulator.advance_kernel import advance_engines
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import IGNORED, LARGE, EngineParams, EngineState, Tree, target_tokens, total
from jaxroute.simulator.slots import append, remove

AFTER_ALL = 1e30
"""s, later than anything: engines that run until then drain."""


class Admission(struct.PyTreeNode):
    """What became of a request at the engines that it was sent to; every field bool [...]."""

    joined: jax.Array
    infeasible: jax.Array  # rejected: the engine could never finish it (rule 8), by its true length
    full: jax.Array  # rejected: there is no free slot


class Finished(struct.PyTreeNode):
    """Requests that left, as they stood in their slots before they left."""

    engines: EngineState
    payload: Any  # each leaf [S, ...]
    served: jax.Array  # bool [S, ...], has all of its tokens; the other slots hold something else
    ignored: jax.Array  # int32 [...], requests that the engine dropped, since they never fit (vllm_v0)


def route(
    engines: EngineState,
    payload: Tree,
    chosen: jax.Array,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    request: Tree,
    params: EngineParams,
) -> tuple[EngineState, Tree, Admission]:
    """Sends a request to the engines that are `chosen` (bool [...]); it joins where it can finish and a slot is free.

    `request` is its payload: a tree like `payload`, with leaves that broadcast to [...].
    """
    can_finish = rules(params).can_serve(prompt_tokens, output_tokens, params)
    free = engines.num_requests < engines.num_slots
    admission = Admission(
        joined=chosen & can_finish & free, infeasible=chosen & ~can_finish, full=chosen & can_finish & ~free
    )
    now = jnp.zeros((), float)
    engines, payload = join(engines, payload, admission.joined, prompt_tokens, output_tokens, request, now, params)
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
) -> tuple[EngineState, Tree]:
    """Puts a request at the tail of `waiting` at time `at` (s), where `joins` (bool [...]); a slot must be free there.

    As `route`, without a question: what can never finish stalls its engine, as in vLLM.
    """
    here = joins & (engines.position == engines.num_requests)
    payload = jax.tree.map(lambda old, new: jnp.where(here, new, old), payload, request)
    target = target_tokens(prompt_tokens, output_tokens, rules(params).longest(params))
    return append(engines, joins, prompt_tokens, target, at), payload


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

    Returns the engines, the work that was done, after that in `work`, and what `on_jump(seen, jump)` made of `seen` in
    every round. With an observer it is the loop of `advance`, else on an NVIDIA GPU the kernel.
    """
    work = EngineWork.none(engines.clock.shape) if work is None else work
    bounds = (until, params, most_iterations, stall_iterations)
    if on_jump is None:
        return (*advance_engines(engines, work, *bounds), seen)
    return advance(engines, work, *bounds, on_jump, seen)


def collect(engines: EngineState, payload: Tree, params: EngineParams) -> tuple[EngineState, Tree, Finished]:
    """Takes out the requests that the engines are done with; those that stay keep their order."""
    done = rules(params).finished(engines, params)
    served, ignored = done, jnp.zeros_like(engines.num_requests)
    if rules(params).ignores:
        served = done & (engines.finish_time > IGNORED)
        ignored = total(done & ~served)
    finished = Finished(engines, payload, served, ignored)
    engines, payload = remove(engines, payload, done)
    return engines, payload, finished


def shift_time(engines: EngineState, by: jax.Array, params: EngineParams) -> EngineState:
    """Moves the present on `by` s (float [...])."""
    engines = engines.replace(clock=engines.clock - by, first_token_time=engines.first_token_time - by)
    if rules(params).finished_stay:
        engines = engines.replace(finish_time=engines.finish_time - by)
    return engines
