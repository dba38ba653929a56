"""What people run today: rules of load balancers and of LLM gateways, from their published formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.impact import expected_length
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import candidates, smallest, smallest_at_random
from jaxroute.simulator.disciplines import used_blocks
from jaxroute.simulator.load_balancing import data_parallel_load


def random(env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams) -> jax.Array:
    """Any expert, all alike."""
    return smallest(jax.random.uniform(key, (env.num_experts,)), candidates(env, state, params))


def least_work(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """The expert with the fewest tokens outstanding, by predictions.

    Sum over its requests of max(prompt - computed, 0) + max(predicted, generated + 1) - generated: prompt tokens still
    to prefill and output tokens still to come. The join-the-least-workload rule of queueing theory, in tokens.
    """
    engines = state.engines
    to_prefill = jnp.maximum(engines.prompt_tokens - engines.computed, 0)
    to_generate = expected_length(state.queued.predicted_tokens, engines.generated) - engines.generated
    work = jnp.where(engines.unfinished(), to_prefill + to_generate, 0).sum(axis=0)
    return smallest(work, candidates(env, state, params))


def power_of_two(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """Of two different random experts the one with fewer requests, running and waiting; of equals, either.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12 (2001),
    https://www.eecs.harvard.edu/~michaelm/postscripts/tpds2001.pdf.
    """
    among = candidates(env, state, params)
    lots = jnp.where(among, jax.random.uniform(key, (env.num_experts,)), 2)
    second = jnp.sort(lots)[min(1, env.num_experts - 1)]
    return smallest(env.queue_lengths(state) + lots / 2, among & (lots <= second))


def latency_based(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    *,
    buffer: float | jax.Array = 0.0,
) -> jax.Array:
    """Any expert, all alike, whose recent latency per output token is at most (1 + `buffer`) times the lowest one.

    LiteLLM's latency-based routing, whose buffer is 0 unless one is set; here it is tuned. An expert without data
    counts as 0 s, so it is tried first. There the latency is a mean of ten, here it is `EnvState.recent_latency`.
    https://github.com/BerriAI/litellm/blob/main/litellm/router_strategy/lowest_latency.py.
    """
    among = candidates(env, state, params)
    latency = jnp.where(among, state.recent_latency, jnp.inf)
    within = latency <= (1 + buffer) * latency.min()
    return smallest(jax.random.uniform(key, (env.num_experts,)), within)


def vllm_data_parallel(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """The expert with the smallest `data_parallel_load`, vLLM's load balancing; ties go to the lowest index."""
    running = state.engines.num_running
    waiting = state.engines.num_requests - running
    return smallest(data_parallel_load(waiting, running), candidates(env, state, params))


def llm_d(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    *,
    queue_weight: float | jax.Array = 2.0,
    kv_weight: float | jax.Array = 2.0,
    load_weight: float | jax.Array = 1.0,
) -> jax.Array:
    """The expert with the highest weighted sum of llm-d's scores, any of equals.

    Over the candidates, with w requests waiting: queue (max w - w) / (max w - min w), 1 where all are equal; KV cache
    1 - use; load 0.5 * (1 - min(w, 128) / 128). The weights are those of llm-d's default and sample profiles, less its
    prefix scorer: here no prompts share one.
    https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/pkg/epp/scheduling/framework/plugins/scorer
    and https://github.com/llm-d/llm-d-inference-scheduler/blob/main/pkg/plugins/scorer/load_aware.go.
    """
    engines, among = state.engines, candidates(env, state, params)
    waiting = engines.num_requests - engines.num_running
    most, least = jnp.where(among, waiting, -1).max(), jnp.where(among, waiting, env.slots).min()
    queue = jnp.where(most > least, (most - waiting) / jnp.maximum(most - least, 1), 1.0)
    kv = 1 - used_blocks(engines, params.engines) / params.engines.usable_blocks
    load = 0.5 * (1 - jnp.minimum(waiting, 128) / 128)
    return smallest_at_random(-(queue_weight * queue + kv_weight * kv + load_weight * load), among, key)


def routellm(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    *,
    threshold: float | jax.Array = 0.0,
    strong: int | jax.Array = 0,
    weak: int | jax.Array = 1,
) -> jax.Array:
    """The strong expert where its predicted score is at least `threshold` above the weak one's, else the weak one.

    RouteLLM's rule with two models and a cutoff on the predicted chance that the strong one wins
    (https://github.com/lm-sys/RouteLLM/blob/main/routellm/routers/routers.py), which grows with the margin between the
    predicted scores. Which two of N experts, and the cutoff, are tuned. Where the chosen one is barred the other takes
    its place, and where both are, the first that is not.
    """
    score, expert = state.request.predicted_score, jnp.arange(env.num_experts)
    wins = score[strong] - score[weak] >= threshold
    chosen, other = jnp.where(wins, strong, weak), jnp.where(wins, weak, strong)
    cost = jnp.where(expert == chosen, 0, jnp.where(expert == other, 1, 2))
    return smallest(cost, candidates(env, state, params))


def score_minus_load(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    *,
    weight: float | jax.Array = 0.05,
) -> jax.Array:
    """The expert with the highest predicted score - `weight` * requests there, running and waiting.

    The weight is tuned, so that this is the strongest rule that looks at no more than one number of each expert.
    """
    cost = weight * env.queue_lengths(state) - state.request.predicted_score
    return smallest(cost, candidates(env, state, params))
