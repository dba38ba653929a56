"""Clients that give up: after a while their requests are cancelled at the engine, as vLLM does when they disconnect."""

import jax
import jax.numpy as jnp

from jaxroute.errors import UserError
from jaxroute.simulator.advance import EngineWork
from jaxroute.simulator.cluster import Finished, abort, run_until
from jaxroute.simulator.engine import NEVER, EngineParams, EngineState, anywhere, lowest, total


def require_cancelling(params: EngineParams) -> None:
    """Raises `UserError` if engines of this discipline cannot cancel requests."""
    if params.discipline != "vllm_v1":
        raise UserError(f"patience: only engines of the discipline vllm_v1 cancel requests, not {params.discipline}")


def run_with_patience(
    engines: EngineState, leaves: jax.Array, until: jax.Array, params: EngineParams
) -> tuple[EngineState, EngineWork]:
    """Runs every iteration that starts before `until` (s [...]), and cancels each request that has not finished at the
    time `leaves` (s [S, ...]): the iterations that start after it are without the request. Raises `UserError`.
    """
    require_cancelling(params)

    def next_to_leave(engines: EngineState) -> jax.Array:
        return lowest(jnp.where(engines.unfinished(), leaves, NEVER))

    def one(carry: tuple[EngineState, EngineWork]) -> tuple[EngineState, EngineWork]:
        engines, work = carry
        bound = jnp.minimum(next_to_leave(engines), until)
        engines, work, _ = run_until(engines, bound, params, work)
        return abort(engines, engines.unfinished() & (leaves <= bound), params), work

    start = engines, EngineWork.none(engines.clock.shape)
    engines, work = jax.lax.while_loop(lambda carry: anywhere(next_to_leave(carry[0]) < until), one, start)
    engines, work, _ = run_until(engines, until, params, work)
    return engines, work


def without_late(finished: Finished, leaves: jax.Array) -> Finished:
    """The same, in which requests that ended in an iteration after their client had left are not served either."""
    late = finished.served & (finished.engines.finish_time > leaves)
    return finished.replace(served=finished.served & ~late, ignored=finished.ignored + total(late))
