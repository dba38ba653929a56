"""What the environments of a batch do next, and what comes of it: the arguments and results of `step`.

B environments are the last axis, except in observations.
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

    gap: jax.Array  # float [B], s from this decision to it
    request: Request
    workload: WorkloadState  # after it


class Turn(struct.PyTreeNode):
    """A decision, or the end of an episode. Environments that take no part in it stay as they are."""

    takes_part: jax.Array  # bool [B]
    action: jax.Array  # int32 [B], expert 0..N-1, N: drop, or NOBODY
    until: jax.Array  # float [B], s: the iterations that start before it run
    arrival: Arrival  # the next request
    ends: jax.Array  # bool []: the arrival comes when all is done, whatever its gap, and begins the next episode

    def only(self, which: jax.Array) -> Turn:
        """The same turn for those `which` (bool [] or [B]) alone."""
        return self.replace(
            takes_part=self.takes_part & which,
            action=jnp.where(which, self.action, NOBODY),
            until=jnp.where(which, self.until, -AFTER_ALL),
        )


class Taken(struct.PyTreeNode):
    """What a turn leads to; 0 in the last three where an environment takes no part."""

    state: EnvState
    observation: Any  # of the state, leaves [B, ...]
    qos: jax.Array  # float [B], of what finished
    credit: jax.Array  # float [B], that as the reward counts it (`EnvParams.credit_discount`)
    penalty: jax.Array  # float [B], 0 where the request joined no expert


class Outcome(struct.PyTreeNode):
    """What a step leads to."""

    state: EnvState  # at the next decision: at the next arrival, or in environments that end, at a new episode's first
    observation: Any  # of it
    final_observation: Any  # at the next arrival, whether the episode ends or not
    qos: jax.Array  # float [B], of what finished up to the next arrival
    credit: jax.Array  # float [B]
    penalty: jax.Array  # float [B]
