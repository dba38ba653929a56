"""Duration of an iteration and of a run of decode iterations, and how many of them start before an instant."""

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import LARGE, LatencyModel


def iteration_time(
    model: LatencyModel, prefill_tokens: jax.Array, decodes: jax.Array, context_tokens: jax.Array
) -> jax.Array:
    """Seconds of an iteration (simulation.md section 2), from np, nd and ctx."""
    above_knee = jnp.maximum(prefill_tokens + decodes - model.knee_tokens, 0)
    return (
        model.base
        + model.per_prefill_token * prefill_tokens
        + model.per_decode * decodes
        + model.per_context_token * context_tokens
        + model.per_token_above_knee * above_knee
    )


def prefill_time(model: LatencyModel, tokens: jax.Array) -> jax.Array:
    """Seconds that prefilling `tokens` adds to an iteration without other tokens."""
    above_knee = jnp.maximum(tokens - model.knee_tokens, 0)
    return model.per_prefill_token * tokens + model.per_token_above_knee * above_knee


def decode_run(model: LatencyModel, decodes: jax.Array, context_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, growth) in seconds: iteration j = 0, 1, ... of an unchanged decode batch takes `first + growth * j`.

    `context_tokens` are the computed tokens of the batch before the run; each iteration adds one for each decode.
    """
    return iteration_time(model, jnp.int32(0), decodes, context_tokens + decodes), model.per_context_token * decodes


def run_time(first: jax.Array, growth: jax.Array, iterations: jax.Array) -> jax.Array:
    """Seconds of the first `iterations` of a decode run: `k*first + growth*k*(k-1)/2`."""
    count = iterations.astype(first.dtype)
    return count * first + growth * (0.5 * count * (count - 1))


def iterations_started_before(first: jax.Array, growth: jax.Array, gap: jax.Array) -> jax.Array:
    """Number of iterations of a decode run that start less than `gap` seconds (> 0) after its beginning, int32 >= 1.

    It is the root of the quadratic, in the form that is stable for small growth. Rounding may make it wrong by one, so
    the times of the neighbouring iterations are checked too.
    """
    linear = first - 0.5 * growth
    root = 2 * gap / (linear + jnp.sqrt(linear * linear + 2 * growth * gap))
    count = jnp.ceil(jnp.clip(root, 1, LARGE)).astype(jnp.int32)
    count -= (run_time(first, growth, count - 1) >= gap) & (count > 1)
    count += run_time(first, growth, count) < gap
    return count
