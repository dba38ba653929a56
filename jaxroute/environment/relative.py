"""Features of experts in units of what each can serve in time, which mean the same in every cluster.

The unit of time is the slack of the arriving request at an expert: its limit per output token, less the time per token
that it would take there alone. Nothing is divided by a number of tokens or requests that a configuration chose.
"""

import jax
import jax.numpy as jnp

from jaxroute.environment.forecast import Forecast, tokens_to_prefill
from jaxroute.environment.impact import expected_length
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import total
from jaxroute.simulator.latency import iteration_time, prefill_time

_LEAST_SLACK = 0.02  # share of the limit: an expert that is too slow even for one request has that much
_MOST = 3.0  # uses are cut there; at 1, a request just meets its limit, or all blocks are taken
_TAKEN = 10.0  # one request takes some hundredths of the slack


def relative_features(
    state: EnvState, params: EnvParams, ahead: Forecast, prefix_share: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Those of `observation.RELATIVE_FEATURES` behind the first four, each float [N, ...].

    `ahead` is the forecast, and `prefix_share`, float [N, ...], is as there.
    """
    engine, request, latency = state.engines, state.request, params.engines.latency
    length = request.predicted_output_tokens.astype(float)
    limit = params.qos_rule.per_token(length)
    prefill = prefill_time(latency, tokens_to_prefill(request, prefix_share))
    context = request.prompt_tokens + length / 2
    alone = iteration_time(latency, jnp.int32(0), jnp.int32(1), context) + prefill / length
    slack = jnp.maximum(limit - alone, _LEAST_SLACK * limit)

    batch_use = jnp.clip((ahead.iteration_time - alone) / slack, 0, _MOST)
    before = jnp.maximum(engine.clock, 0) + ahead.prefill_time + prefill
    latency_use = jnp.clip((ahead.iteration_time + before / length - alone) / slack, 0, _MOST)

    unfinished = engine.unfinished()
    ends = engine.prompt_tokens + expected_length(state.queued.predicted_tokens, engine.generated)
    blocks = total(jnp.where(unfinished, rules(params.engines).held_blocks(ends, params.engines), 0))
    blocks += rules(params.engines).held_blocks(request.prompt_tokens + request.predicted_output_tokens, params.engines)
    kv_ahead = jnp.clip(blocks / params.engines.usable_blocks, 0, _MOST)

    above = jnp.where(total(unfinished) + 1 > latency.knee_tokens, latency.per_token_above_knee, 0)
    taken = (latency.per_decode + latency.per_context_token * context + above) / slack
    # Each arrival takes `taken` of the slack while it decodes, and all of it while it is prefilled.
    experts = jnp.maximum((params.engines.max_model_len > 0).sum(0), 1)
    seconds = length * limit * taken + prefill * limit / slack
    demand = jnp.where(state.step > 0, seconds / experts / jnp.maximum(state.recent_gap, 1e-9), 0)
    demand = demand / (1 + demand)
    prefill_ahead = ahead.prefill_time / (limit * length)
    least = jnp.where(params.engines.max_model_len > 0, latency_use, _MOST).min(0)
    return (
        batch_use,
        batch_use**2 / _MOST,
        latency_use,
        latency_use**2 / _MOST,
        kv_ahead,
        kv_ahead**2 / _MOST,
        demand,
        demand**2,
        ahead.impact * demand,
        prefill_ahead / (1 + prefill_ahead),
        _TAKEN * taken / (1 + _TAKEN * taken),
        least + jnp.zeros_like(latency_use),
    )
