"""Rules of current load balancers and LLM gateways, from their published formulas."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.impact import expected_length
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import (
    cheapest,
    held_share,
    kv_use,
    predicted_latency,
    smallest,
    smallest_at_random,
    turns_away,
    waiting_requests,
)
from jaxroute.simulator.load_balancing import data_parallel_load


def random(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """An expert chosen uniformly at random."""
    return smallest(jax.random.uniform(key, (env.num_experts,)), among)


def least_work(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The expert with the fewest predicted outstanding tokens.

    The outstanding tokens of a request are max(prompt - computed, 0) + max(predicted, generated + 1) - generated:
    prompt tokens to prefill and output tokens to generate. This is the join-the-least-workload rule, in tokens.
    """
    engines = state.engines
    to_prefill = jnp.maximum(engines.prompt_tokens - engines.computed, 0)
    to_generate = expected_length(state.queued.predicted_tokens, engines.generated) - engines.generated
    work = jnp.where(engines.unfinished(), to_prefill + to_generate, 0).sum(axis=0)
    return smallest(work, among)


def power_of_two(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """Of two different random experts, the one with fewer requests, running and waiting; ties are broken at random.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12 (2001),
    https://www.eecs.harvard.edu/~michaelm/postscripts/tpds2001.pdf.
    """
    lots = jnp.where(among, jax.random.uniform(key, (env.num_experts,)), 2)
    second = jnp.sort(lots)[min(1, env.num_experts - 1)]
    return smallest(env.queue_lengths(state) + lots / 2, among & (lots <= second))


def latency_based(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    buffer: float | jax.Array = 0.0,
) -> jax.Array:
    """A random one of the experts whose recent latency per output token is at most (1 + `buffer`) times the lowest.

    This is LiteLLM's latency-based routing. Its default buffer is 0; here the buffer is tuned. An expert without data
    counts as 0 s, so it is tried first. LiteLLM averages the last ten latencies; here it is `EnvState.recent_latency`.
    https://github.com/BerriAI/litellm/blob/main/litellm/router_strategy/lowest_latency.py.
    """
    latency = jnp.where(among, state.recent_latency, jnp.inf)
    within = latency <= (1 + buffer) * latency.min()
    return smallest(jax.random.uniform(key, (env.num_experts,)), within)


def vllm_data_parallel(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """vLLM's present load balancing: the expert with the smallest max(in flight, waiting + running) + KV pressure.

    The pressure is 6 * waiting * max(0, KV use - 0.5). In flight are the requests that this client sent and that have
    not ended, times the number of clients: with one client and counts that are always current, waiting + running. The
    scan begins one expert later at each decision and the first of equal ones wins, so ties are in rotation.
    `DPLBAsyncMPClient.get_core_engine_for_request`,
    https://github.com/vllm-project/vllm/blob/main/vllm/v1/engine/core_client.py.
    """
    pressure = 6 * waiting_requests(state) * jnp.maximum(kv_use(state, params) - 0.5, 0)
    return smallest(turns_away(env, state), cheapest(env.queue_lengths(state) + pressure, among))


def vllm_data_parallel_v0_10(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """vLLM's earlier load balancing: the smallest `data_parallel_load`. Ties go to the lowest index."""
    return smallest(data_parallel_load(waiting_requests(state), state.engines.num_running), among)


def llm_d(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    queue_weight: float | jax.Array = 2.0,
    kv_weight: float | jax.Array = 2.0,
    load_weight: float | jax.Array = 1.0,
    prefix_weight: float | jax.Array = 0.0,
) -> jax.Array:
    """The expert with the highest weighted sum of llm-d's scores; ties are broken at random.

    For a candidate with w waiting requests, the scores are: queue (max w - w) / (max w - min w), or 1 if all are equal;
    KV cache 1 - use; load 0.5 * (1 - min(w, 128) / 128); prefix: the share of the prompt that it is expected to hold.
    The weights are those of llm-d's default and sample profiles without its prefix scorer, for prompts that share
    nothing. `llm_d_prefix` has those of the default profile, 2, 2, 0 and 3.
    https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/pkg/epp/scheduling/framework/plugins/scorer
    and https://github.com/llm-d/llm-d-inference-scheduler/blob/main/pkg/plugins/scorer/load_aware.go.
    """
    waiting = waiting_requests(state)
    most, least = jnp.where(among, waiting, -1).max(), jnp.where(among, waiting, env.slots).min()
    queue = jnp.where(most > least, (most - waiting) / jnp.maximum(most - least, 1), 1.0)
    kv = 1 - kv_use(state, params)
    load = 0.5 * (1 - jnp.minimum(waiting, 128) / 128)
    value = queue_weight * queue + kv_weight * kv + load_weight * load
    value += prefix_weight * held_share(env, state, params)
    return smallest_at_random(-value, among, key)


def routellm(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
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
    return smallest(cost, among)


def score_minus_load(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    weight: float | jax.Array = 0.05,
) -> jax.Array:
    """The expert with the highest predicted score - `weight` * its requests, running and waiting.

    The weight is tuned, so this is the strongest of the rules that use one number per expert for its load.
    """
    cost = weight * env.queue_lengths(state) - state.request.predicted_score
    return smallest(cost, among)


def index_rule(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    load_weight: float | jax.Array = 0.05,
    length_weight: float | jax.Array = 0.0,
    threshold: float | jax.Array = -1.0,
    cap: float | jax.Array = 1000.0,
    prefix_weight: float | jax.Array = 0.0,
) -> jax.Array:
    """The expert with the highest value among those with fewer than `cap` requests; drops if no value is enough.

    The value of an expert is its predicted score - `load_weight` * its requests, running and waiting -
    `length_weight` * the predicted output tokens of the arriving request there / 100. The request is dropped if no
    expert is below the cap, or if the highest value is not above `threshold`. All four numbers are tuned. Where
    requests may not be dropped (`env.drop`), cap and threshold have no effect. `index_rule_prefix` has a further term,
    which is tuned too: `prefix_weight` * the share of the prompt that the expert is expected to hold.
    """
    request, load = state.request, env.queue_lengths(state)
    value = request.predicted_score - load_weight * load - length_weight * request.predicted_output_tokens / 100
    value += prefix_weight * held_share(env, state, params)
    enough = among & (load < cap) & (value > threshold)
    if not env.drop:
        return smallest(-value, among)
    return jnp.where(enough.any(), smallest(-value, enough), env.num_experts).astype(jnp.int32)


def route_balance(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    latency_weight: float | jax.Array = 1.0,
    cost_weight: float | jax.Array = 0.0,
) -> jax.Array:
    """RouteBalance (arXiv 2606.17949): the highest weighted sum of score, latency and cost; ties to the shortest queue.

    The sum is score + `latency_weight` * (1 - latency / the highest latency) + `cost_weight` * (1 - cost / the highest
    cost), all predicted and relative to the candidates; the weight of the score, raw, is 1. The latency is that from
    arrival to end, which the paper learns from data: here `predicted_latency` times the predicted length. The cost is
    the predicted output tokens, since all experts have one price for a token here. Both weights are tuned. The paper's
    batches of decisions are of one request here. `_score_and_pick_instance`,
    https://github.com/AKafakA/route-balance/blob/main/route_balance/global_scheduler/route_balance/route_balance_serve.py.
    """
    cost = state.request.predicted_output_tokens
    latency = predicted_latency(state, params) * cost
    relative = lambda values: 1 - values / jnp.where(among, values, 0).max()  # noqa: E731
    value = state.request.predicted_score + latency_weight * relative(latency) + cost_weight * relative(cost)
    return smallest(env.queue_lengths(state), cheapest(-value, among))
