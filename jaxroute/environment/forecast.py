"""What the arriving request would do to each expert, from predictions over the whole queue.

Each value is a sum over all S slots of an engine, so nothing of a long queue is lost, however few requests are observed
one by one. No value is computed from true output lengths or scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute.environment.impact import expected_length, waiting_line
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import prefix_sum, total
from jaxroute.simulator.latency import iteration_time, prefill_time
from jaxroute.workload.request import Request

SPREAD_DONE, SPREAD_AHEAD = 0.02, 0.15
"""Standard error of a predicted latency, relative to the limit: for a request at its end, and in addition for one that
has all of its tokens still to come."""


class Forecast(NamedTuple):
    """For each expert, float [N, ...]; a request's chance is its predicted probability to meet the latency limit."""

    expected_qos: jax.Array  # the arriving request's predicted score times its chance, less its predicted cost
    impact: jax.Array  # predicted scores times lost chances of the requests there, if it joins
    at_risk: jax.Array  # predicted scores times missing chances of the requests there
    iteration_time: jax.Array  # s, a decode iteration of all requests there and the arriving one
    remaining_tokens: jax.Array  # predicted output tokens still to come there
    prefill_time: jax.Array  # s, to prefill the waiting requests


def forecast(state: EnvState, params: EnvParams, prefix_share: jax.Array | None = None) -> Forecast:
    """The forecast of the arriving request at each expert, for arrays with any axes behind [S, N].

    `prefix_share`, float [N, ...], is the share of its prompt that each expert is expected to hold, which it need not
    prefill; None: nothing. Of waiting requests, whole prompts are prefilled.

    A request's finish is predicted as in `impact.predicted_impact`, but with the decode time of a batch of all
    requests, waiting ones included. Its chance is a logistic function of the slack, instead of a step: what is near to
    the limit counts in part, since predictions are uncertain and further requests will arrive.
    """
    engine, queued, request, qos_rule = state.engines, state.queued, state.request, params.qos_rule
    rule, latency = rules(params.engines), params.engines.latency
    unfinished, line = engine.unfinished(), waiting_line(engine, params.engines)
    length = expected_length(queued.predicted_tokens, engine.generated).astype(float)
    remaining = jnp.where(unfinished, length - engine.generated, 0)
    own_length = request.predicted_output_tokens.astype(float)

    batch, context = total(unfinished), total(jnp.where(unfinished, line.held, 0)).astype(float)
    own_context = request.prompt_tokens + own_length / 2
    alone = iteration_time(latency, jnp.int32(0), batch, context)
    joined = iteration_time(latency, jnp.int32(0), batch + 1, context + own_context)

    own_prefill = prefill_time(latency, tokens_to_prefill(request, prefix_share))
    needed = line.blocks[-1] + rule.held_blocks(request.prompt_tokens + 1, params.engines)
    own_unseated = (needed > rule.admissible_blocks(params.engines)) | (batch >= params.engines.max_num_seqs)
    turnover, prefills = line.turnover(alone, remaining), line.prefill_time
    begun = jnp.maximum(engine.clock, 0)

    finish = begun - queued.arrival + prefills + turnover * prefix_sum(line.unseated) + alone * remaining
    delayed = (joined - alone) * jnp.minimum(remaining, own_length) + jnp.where(line.running, own_prefill, 0)
    limit, spread = qos_rule.per_token(length), SPREAD_DONE + SPREAD_AHEAD * remaining / length
    chance = jax.nn.sigmoid((1 - finish / length / limit) / spread)
    left = jax.nn.sigmoid((1 - (finish + delayed) / length / limit) / spread)
    score = jnp.where(unfinished, jnp.maximum(queued.predicted_score, 0), 0)

    own_finish = (
        begun + prefills[-1] + turnover * (total(line.unseated) + own_unseated) + own_prefill + joined * own_length
    )
    own_slack = 1 - own_finish / own_length / qos_rule.per_token(own_length)
    own_chance = jax.nn.sigmoid(own_slack / (SPREAD_DONE + SPREAD_AHEAD))
    return Forecast(
        expected_qos=request.predicted_score * own_chance - qos_rule.cost(request.predicted_output_tokens),
        impact=total(score * jnp.maximum(chance - left, 0)),  # rounding alone could make it negative
        at_risk=total(score * (1 - chance)),
        iteration_time=joined,
        remaining_tokens=total(remaining),
        prefill_time=prefills[-1],
    )


def tokens_to_prefill(request: Request, prefix_share: jax.Array | None) -> jax.Array:
    """Prompt tokens of the arriving request, [N, ...] or [...], that an expert is not expected to hold."""
    return request.prompt_tokens if prefix_share is None else request.prompt_tokens * (1 - prefix_share)
