"""What a router sees of engines that export counts only: gauges, and no single request."""

import jax.numpy as jnp

from jaxroute.environment.impact import decode_time
from jaxroute.environment.state import QueuedRequests
from jaxroute.errors import UserError
from jaxroute.simulator.disciplines import rules, used_blocks
from jaxroute.simulator.engine import NEVER, EngineParams, EngineState
from jaxroute.workload.request import Request


def require_counts(params: EngineParams) -> None:
    """Raises `UserError` for engines of which requests that are alike would say more or less than the gauges do."""
    if params.enable_prefix_caching or params.async_scheduling:
        raise UserError("signals=counts needs engines without prefix caching and asynchronous scheduling")
    if not rules(params).grows:
        raise UserError("signals=counts needs engines whose used blocks grow with the tokens; leave orca out")


def counted(
    engines: EngineState, queued: QueuedRequests, request: Request, params: EngineParams
) -> tuple[EngineState, QueuedRequests]:
    """Engines with the same gauges, whose requests are all like `request`, which arrives; any trailing axes.

    The gauges are running and waiting requests and used KV blocks. A running request is halfway through its predicted
    output, holds an equal part of the used blocks, and has arrived when it would have at the present pace, without a
    wait for its first token. A waiting request has just arrived. Times are relative to the present, and nothing of the
    iteration under way is known.
    """
    unfinished = engines.unfinished()
    running = unfinished & (engines.position < engines.num_running)
    zero = jnp.zeros_like(engines.prompt_tokens)
    predicted = request.predicted_output_tokens + zero
    held = used_blocks(engines, params) * params.block_size // jnp.maximum(engines.num_running, 1) + zero
    # The last token of a running request is not in the cache yet.
    half = jnp.where(running, jnp.clip(predicted // 2, 1, jnp.maximum(held, 1)), 0)
    prompt = jnp.where(running, jnp.maximum(held - half + 1, 1), request.prompt_tokens + zero)
    seen = engines.replace(
        clock=jnp.zeros_like(engines.clock),
        prompt_tokens=jnp.where(unfinished, prompt, 0),
        target_tokens=jnp.where(unfinished, jnp.maximum(predicted, half + 1), 0),
        generated=half,
        computed=jnp.where(running, prompt + half - 1, 0),
        preemptions=zero,
    )
    age = jnp.where(running, half * decode_time(seen, params), 0).astype(queued.arrival.dtype)
    seen = seen.replace(first_token_time=jnp.where(running, -age, NEVER))
    score = jnp.where(unfinished, request.predicted_score + jnp.zeros_like(queued.score), 0)
    return seen, QueuedRequests(
        arrival=-age,
        index=zero,
        score=score,
        predicted_score=score,
        predicted_tokens=jnp.where(unfinished, predicted, 0),
    )
