"""What a request's answer is worth: its QoS, in the paper's form and as goodput, and less its cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


class QosRule(struct.PyTreeNode):
    """When a request meets its limit, and its QoS; every field is traced (simulation.md section 4).

    With both `ttft_limit` and `tpot_limit`, they take the place of `latency_limit`.
    """

    latency_limit: jax.Array  # float [], s per output token from arrival to last token
    ttft_limit: jax.Array | None = None  # float [], s from arrival to first token
    tpot_limit: jax.Array | None = None  # float [], s for each further token, on average
    token_price: jax.Array | None = None  # float [N], QoS that 1,000 output tokens of each expert cost

    def per_token(self, tokens: jax.Array) -> jax.Array:
        """float, s per output token that a request of `tokens` output tokens may take, from arrival to last token.

        It is exact for the paper's form. For goodput it allows the whole answer as long as both limits together.
        """
        if self.ttft_limit is None or self.tpot_limit is None:
            return self.latency_limit
        return self.tpot_limit + (self.ttft_limit - self.tpot_limit) / tokens

    def met(self, ttft: jax.Array, latency: jax.Array, tokens: jax.Array) -> jax.Array:
        """bool: a completed request meets its limit.

        `ttft` and `latency`, float, are s from its arrival to its first and to its last token; `tokens`, int32, are its
        output tokens, at least 1.
        """
        if self.ttft_limit is None or self.tpot_limit is None:
            return latency / tokens < self.latency_limit
        steady = (tokens == 1) | (latency - ttft < self.tpot_limit * (tokens - 1))
        return (ttft < self.ttft_limit) & steady

    def cost(self, tokens: jax.Array) -> jax.Array:
        """float, QoS that `tokens` (int32 [..., N] or [..., N, B]) output tokens cost."""
        return jnp.zeros((), float) if self.token_price is None else self.token_price * tokens / 1000
