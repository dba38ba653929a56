"""What a router sees: the arriving request, the experts and the heads of their queues, as fixed-size arrays.

Nothing here is computed from true output lengths or scores.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.environment.impact import decode_time, expected_length
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.engine import EngineParams, EngineState, blocks_for

ARRIVED_FEATURES = ("prompt_tokens",)
EXPERT_FEATURES = (
    "kv_use",
    "running",
    "waiting",
    "iteration_time",
    "predicted_score",
    "predicted_tokens",
    "predicted_latency",
)
REQUEST_FEATURES = (
    "prompt_tokens",
    "predicted_score",
    "predicted_tokens",
    "kv_use",
    "generated_tokens",
    "latency_so_far",
    "predicted_latency",
)
"""Features in order. Tokens are over `token_scale`, scores (s - 0.5) * 4, queue lengths over `queue_nodes`, KV use a
share of the expert's cache. Times per token are over the latency limit and squashed by x / (1 + x), so 0.5 is at the
limit."""


class GraphObservation(flax.struct.PyTreeNode):
    """The routing graph of one decision (simulation.md section 5). N experts, K nodes per queue; features of order 1.

    All fields are traced; any leading batch axes may stand before the shapes given here.
    """

    arrived: jax.Array  # float32 [Fa]: features of the arriving request that do not depend on the expert
    expert: jax.Array  # float32 [N, Fe]: the expert's load, and the predictions for the arriving request there
    running: jax.Array  # float32 [N, K, Fq]: first K running requests of each expert
    waiting: jax.Array  # float32 [N, K, Fq]: first K waiting requests of each expert
    running_mask: jax.Array  # bool [N, K]: True = a real request; features elsewhere must not matter
    waiting_mask: jax.Array  # bool [N, K]
    action_mask: jax.Array  # bool [N + 1]: True = allowed; the last action (drop) always is


def _squash(ratio: jax.Array) -> jax.Array:
    return ratio / (1 + ratio)


def _score(score: jax.Array) -> jax.Array:
    return (score - 0.5) * 4


def action_mask(params: EnvParams, state: EnvState) -> jax.Array:
    """bool [N + 1]: an expert is allowed if it has a free slot and could hold the prompt and a token; drop always."""
    engines, prompt = params.engines, state.request.prompt_tokens
    fits = blocks_for(prompt, engines.block_size) <= engines.usable_blocks
    fits &= prompt < engines.max_model_len
    fits &= engines.enable_chunked_prefill | (prompt <= engines.max_num_batched_tokens)
    allowed = fits & (state.engines.num_requests < state.engines.num_slots)
    return jnp.append(allowed, True)


def observe(params: EnvParams, state: EnvState, queue_nodes: int) -> GraphObservation:
    """The observation of one environment with K = `queue_nodes`."""
    request, slots, scale = state.request, state.slots, params.token_scale

    def of_expert(engine_params: EngineParams, engine: EngineState, arrival, predicted_score, predicted_tokens):
        iteration = decode_time(engine_params, engine)
        blocks = blocks_for(engine.computed, engine_params.block_size)
        length = expected_length(predicted_tokens, engine.generated)
        finish = jnp.maximum(engine.clock, 0) - arrival + iteration * (length - engine.generated)
        per_token = -arrival / jnp.maximum(engine.generated, 1)
        features = jnp.stack(
            [
                engine.prompt_tokens / scale,
                _score(predicted_score),
                predicted_tokens / scale,
                blocks / engine_params.usable_blocks,
                engine.generated / scale,
                _squash(per_token / params.latency_limit),
                _squash(finish / length / params.latency_limit),
            ],
            axis=-1,
        )
        features = jnp.pad(features, ((0, queue_nodes), (0, 0)))
        nodes = jnp.arange(queue_nodes)
        running_mask = nodes < engine.num_running
        waiting_mask = nodes < engine.num_requests - engine.num_running
        running = jnp.where(running_mask[:, None], features[:queue_nodes], 0)
        waiting = jax.lax.dynamic_slice_in_dim(features, engine.num_running, queue_nodes)
        waiting = jnp.where(waiting_mask[:, None], waiting, 0)
        used = jnp.sum(jnp.where(jnp.arange(engine.num_slots) < engine.num_running, blocks, 0))
        return running, waiting, running_mask, waiting_mask, used / engine_params.usable_blocks, iteration

    running, waiting, running_mask, waiting_mask, kv_use, iteration = jax.vmap(of_expert)(
        params.engines, state.engines, slots.arrival, slots.predicted_score, slots.predicted_tokens
    )
    engines = state.engines
    prefill = params.engines.latency.per_prefill_token * request.prompt_tokens
    finish = jnp.maximum(engines.clock, 0) + prefill + iteration * request.predicted_output_tokens
    expert = jnp.stack(
        [
            kv_use,
            engines.num_running / queue_nodes,
            (engines.num_requests - engines.num_running) / queue_nodes,
            _squash(iteration / params.latency_limit),
            _score(request.predicted_score),
            request.predicted_output_tokens / scale,
            _squash(finish / request.predicted_output_tokens / params.latency_limit),
        ],
        axis=-1,
    )
    return GraphObservation(
        arrived=(request.prompt_tokens / scale)[None].astype(jnp.float32),
        expert=expert.astype(jnp.float32),
        running=running.astype(jnp.float32),
        waiting=waiting.astype(jnp.float32),
        running_mask=running_mask,
        waiting_mask=waiting_mask,
        action_mask=action_mask(params, state),
    )


def flatten(observation: GraphObservation) -> jax.Array:
    """One vector, float32 [F]: the features in the order of the fields, then the masks."""
    return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(observation)])
