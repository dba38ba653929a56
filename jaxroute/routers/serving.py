"""Rules of current load balancers and LLM gateways, from their published formulas."""

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
    """An expert chosen uniformly at random."""
    return smallest(jax.random.uniform(key, (env.num_experts,)), candidates(env, state, params))


def least_work(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """The expert with the fewest predicted outstanding tokens.

    The outstanding tokens of a request are max(prompt - computed, 0) + max(predicted, generated + 1) - generated:
    prompt tokens to prefill and output tokens to generate. This is the join-the-least-workload rule, in tokens.
    """
    engines = state.engines
    to_prefill = jnp.maximum(engines.prompt_tokens - engines.computed, 0)
    to_generate = expected_length(state.queued.predicted_tokens, engines.generated) - engines.generated
    work = jnp.where(engines.unfinished(), to_prefill + to_generate, 0).sum(axis=0)
    return smallest(work, candidates(env, state, params))


def power_of_two(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """Of two different random experts, the one with fewer requests, running and waiting; ties are broken at random.

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
    """A random one of the experts whose recent latency per output token is at most (1 + `buffer`) times the lowest.

    This is LiteLLM's latency-based routing. Its default buffer is 0; here the buffer is tuned. An expert without data
    counts as 0 s, so it is tried first. LiteLLM averages the last ten latencies; here it is `EnvState.recent_latency`.
    https://github.com/BerriAI/litellm/blob/main/litellm/router_strategy/lowest_latency.py.
    """
    among = candidates(env, state, params)
    latency = jnp.where(among, state.recent_latency, jnp.inf)
    within = latency <= (1 + buffer) * latency.min()
    return smallest(jax.random.uniform(key, (env.num_experts,)), within)


def vllm_data_parallel(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams
) -> jax.Array:
    """The expert with the smallest `data_parallel_load`: vLLM's load balancing. Ties go to the lowest index."""
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
    """The expert with the highest weighted sum of llm-d's scores; ties are broken at random.

    For a candidate with w waiting requests, the scores are: queue (max w - w) / (max w - min w), or 1 if all are equal;
    KV cache 1 - use; load 0.5 * (1 - min(w, 128) / 128). The weights are those of llm-d's default and sample profiles
    without its prefix scorer, because prompts here share no prefixes.
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
    """The strong expert if its predicted score is at least `threshold` above the weak expert's, else the weak expert.

    This is RouteLLM's rule for two models, with a cutoff on the predicted probability that the strong one wins
    (https://github.com/lm-sys/RouteLLM/blob/main/routellm/routers/routers.py), which increases with the difference of
    the predicted scores. The two experts and the cutoff are tuned. If the chosen expert is not allowed, the other one
    is chosen; if both are not, the first allowed expert.
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
    """The expert with the highest predicted score - `weight` * its requests, running and waiting.

    The weight is tuned, so this is the strongest of the rules that use one number per expert for its load.
    """
    cost = weight * env.queue_lengths(state) - state.request.predicted_score
    return smallest(cost, candidates(env, state, params))


def index_rule(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    *,
    load_weight: float | jax.Array = 0.05,
    length_weight: float | jax.Array = 0.0,
    threshold: float | jax.Array = -1.0,
    cap: float | jax.Array = 1000.0,
) -> jax.Array:
    """The expert with the highest value among those with fewer than `cap` requests; drops if no value is enough.

    The value of an expert is its predicted score - `load_weight` * its requests, running and waiting -
    `length_weight` * the predicted output tokens of the arriving request there / 100. The request is dropped if no
    expert is below the cap, or if the highest value is not above `threshold`. All four numbers are tuned. Where
    requests may not be dropped (`env.drop`), cap and threshold have no effect.
    """
    request, load, among = state.request, env.queue_lengths(state), candidates(env, state, params)
    value = request.predicted_score - load_weight * load - length_weight * request.predicted_output_tokens / 100
    enough = among & (load < cap) & (value > threshold)
    if not env.drop:
        return smallest(-value, among)
    return jnp.where(enough.any(), smallest(-value, enough), env.num_experts).astype(jnp.int32)
