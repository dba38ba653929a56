"""Rules that weigh prefix caches against load, from their published formulas.

What they know of the caches is `held_share`. Where prompts share nothing, it is 0.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import held_share, smallest, smallest_at_random
from jaxroute.simulator.disciplines import rules


def dynamo_kv(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    overlap_weight: float | jax.Array = 1.0,
    temperature: float | jax.Array = 0.0,
) -> jax.Array:
    """The expert with the lowest `overlap_weight` * prefill blocks + active blocks, as NVIDIA Dynamo's KV router.

    Prefill blocks are those of tokens that were not computed: of the requests there, and of the arriving one, without
    the share that the expert holds. Active blocks are those of all tokens of the requests there, and of the prompt. At
    a `temperature` above 0, an expert is drawn with a probability proportional to exp(-cost / range / temperature),
    where the range is that of the candidates' costs. Ties are broken at random. `softmax_sample` and `worker_logit`,
    https://github.com/ai-dynamo/dynamo/blob/main/lib/kv-router/src/scheduling/selector.rs.
    """
    engines, request, size = state.engines, state.request, params.engines.block_size
    there, held = engines.unfinished(), rules(params.engines).held_blocks
    to_prefill = jnp.where(there, jnp.maximum(engines.prompt_tokens - engines.computed, 0), 0).sum(axis=0)
    to_prefill = to_prefill + request.prompt_tokens * (1 - held_share(env, state, params))
    active = jnp.where(there, held(engines.prompt_tokens + engines.generated, params.engines), 0).sum(axis=0)
    cost = overlap_weight * to_prefill / size + active + held(request.prompt_tokens, params.engines)
    span = jnp.where(among, cost, -jnp.inf).max() - jnp.where(among, cost, jnp.inf).min()
    noise = jax.random.gumbel(key, cost.shape)  # the smallest cost - T * range * noise is a draw from the softmax
    drawn = smallest(cost - temperature * span * noise, among)
    return jnp.where(jnp.asarray(temperature) * span > 0, drawn, smallest_at_random(cost, among, key))


def sglang_cache_aware(
    env: RoutingEnvironment,
    key: jax.Array,
    observation: Any,
    state: EnvState,
    params: EnvParams,
    among: jax.Array,
    *,
    cache_threshold: float | jax.Array = 0.3,
    balance_abs_threshold: float | jax.Array = 64,
    balance_rel_threshold: float | jax.Array = 1.5,
) -> jax.Array:
    """SGLang's cache-aware policy: the expert that holds most of the prompt, unless that is little or load is unequal.

    Loads are requests, running and waiting. If the highest is more than `balance_abs_threshold` above the lowest, and
    more than `balance_rel_threshold` times it, or if no expert holds more than `cache_threshold` of the prompt, the
    expert with the lowest load is chosen. Ties go to the lowest index. The defaults are those of the router's
    documentation, https://github.com/sgl-project/sglang/blob/main/sgl-model-gateway/README.md; the absolute threshold
    is for many more requests than experts here hold, so both are tuned.
    """
    load, share = env.queue_lengths(state), held_share(env, state, params)
    most, least = jnp.where(among, load, -1).max(), jnp.where(among, load, env.slots).min()
    unequal = (most - least > balance_abs_threshold) & (most > balance_rel_threshold * least)
    by_load = unequal | (jnp.where(among, share, 0).max() <= cache_threshold)
    return smallest(jnp.where(by_load, load, -share), among)
