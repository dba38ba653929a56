"""The arguments and results of `step`: what the environments of a batch do next, and the outcome.

The B environments are the last axis, except in observations.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.state import EnvState
from jaxroute.simulator.cluster import AFTER_ALL
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request

NOBODY = -1
"""The action of a turn in which no request is routed."""


class Arrival(struct.PyTreeNode):
    """The next arrival of each environment."""

    gap: jax.Array  # float [B], s from this decision to the arrival
    request: Request
    workload: WorkloadState  # after the arrival


class Turn(struct.PyTreeNode):
    """A decision, or the end of an episode. Environments that do not take part do not change."""

    takes_part: jax.Array  # bool [B]
    action: jax.Array  # int32 [B], expert 0..N-1, N: drop, or NOBODY
    until: jax.Array  # float [B], s: iterations that start before it run
    arrival: Arrival  # the next request
    ends: jax.Array  # bool []: the arrival begins the next episode, after all requests have ended; its gap is ignored

    def only(self, which: jax.Array) -> Turn:
        """The same turn, in which only `which` (bool [] or [B]) take part."""
        return self.replace(
            takes_part=self.takes_part & which,
            action=jnp.where(which, self.action, NOBODY),
            until=jnp.where(which, self.until, -AFTER_ALL),
        )


class Taken(struct.PyTreeNode):
    """The result of a turn. The last three fields are 0 if an environment does not take part."""

    state: EnvState
    observation: Any  # of `state`, leaves [B, ...]
    qos: jax.Array  # float [B], of the finished requests
    credit: jax.Array  # float [B], the same in the reward (`EnvParams.credit_discount`)
    penalty: jax.Array  # float [B], 0 if the request joined no expert


class Outcome(struct.PyTreeNode):
    """The result of a step."""

    state: EnvState  # at the next decision: the next arrival, or the first one of a new episode
    observation: Any  # of `state`
    final_observation: Any  # at the next arrival, even if the episode ends
    qos: jax.Array  # float [B], of the requests that finished up to the next arrival
    credit: jax.Array  # float [B]
    penalty: jax.Array  # float [B]
