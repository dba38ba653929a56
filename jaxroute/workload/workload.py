"""A workload: arrivals and requests, sampled from keys inside jit."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.errors import UserError
from jaxroute.workload.arrivals import Arrivals, TraceArrivals, WorkloadState
from jaxroute.workload.lognormal import LognormalRequests
from jaxroute.workload.prefixes import PrefixRequests
from jaxroute.workload.request import Request
from jaxroute.workload.requests import FrozenRequests, QuantileRequests, TableRequests, TraceRequests

Requests = FrozenRequests | QuantileRequests | LognormalRequests | TableRequests | TraceRequests | PrefixRequests


class Workload(struct.PyTreeNode):
    """Arrivals and requests for N experts. It is a pytree of traced leaves: a sweep vmaps over rates or mean scores.

    The kinds of arrivals and requests are part of the structure of the tree, so they are selected at compile time.
    """

    arrivals: Arrivals
    requests: Requests
    true_lengths: bool = struct.field(
        pytree_node=False, default=False
    )  # static: predicted lengths are the true lengths

    @classmethod
    def create(
        cls,
        arrivals: Arrivals,
        requests: Requests,
        true_lengths: bool = False,
    ) -> Workload:
        """Raises `UserError` for requests with a trace's lengths without that trace's arrivals."""
        if isinstance(requests, TraceRequests) and (
            not isinstance(arrivals, TraceArrivals) or arrivals.gaps.shape != requests.prompt_tokens.shape
        ):
            raise UserError("requests with a trace's lengths need that same trace's arrivals; set both from one file")
        return cls(arrivals=arrivals, requests=requests, true_lengths=true_lengths)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.requests.num_experts

    def reset(self, key: jax.Array) -> WorkloadState:
        """The state before the first arrival. The key is that of a trace with a random start, and of a pool."""
        state = self.arrivals.reset(key)
        if isinstance(self.requests, PrefixRequests):
            state = state.replace(pool=self.requests.reset(jax.random.fold_in(key, 1)))
        return state

    def sample(self, key: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, Request]:
        """The next arrival: the state after it, the seconds since the previous arrival (float []), and the request.

        Use a fresh key for each call.
        """
        return self.next(self.draw(key), state)

    def draw(self, key: jax.Array) -> jax.Array:
        """All random numbers of one arrival: uniforms strictly between 0 and 1, float [draws]."""
        uniforms = jax.random.uniform(key, (self.arrivals.draws + self.requests.draws,))
        # JAX's uniforms are multiples of eps, including 0. The middles of their cells are symmetric, and never 0 or 1.
        return uniforms + jnp.finfo(uniforms.dtype).eps / 2

    def next(self, uniforms: jax.Array, state: WorkloadState) -> tuple[WorkloadState, jax.Array, Request]:
        """Like `sample`, with the uniforms from `draw`."""
        count = self.arrivals.draws
        following, gap, row = self.arrivals.next(uniforms[:count], state)
        if isinstance(self.requests, PrefixRequests):
            pool, request = self.requests.next(uniforms[count:], state.pool)
            following = following.replace(pool=pool)
        else:
            request = self.requests.sample(uniforms[count:], row)
        if self.true_lengths:
            request = replace(request, predicted_output_tokens=request.output_tokens)
        return following, gap, request
