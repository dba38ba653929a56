"""Linear policies on the experts' features, and the universal one, whose weights are in `universal.json`."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import RELATIVE_FEATURES, RoutingGraph, expert_features
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import actions_among

UNIVERSAL = Path(__file__).with_name("universal.json")


def linear_values(weights: jax.Array, observation: RoutingGraph) -> jax.Array:
    """Values, float32 [N + 1], of the actions under the linear policy with `weights` [Fe + 1]; -inf if forbidden."""
    values = jnp.append(observation.expert @ weights[:-1], weights[-1])
    return jnp.where(observation.action_mask, values, -jnp.inf)


def linear_policy(
    weights: jax.Array, key: jax.Array, observation: RoutingGraph, state: Any, params: EnvParams
) -> jax.Array:
    """The action with the highest of `linear_values`, int32 []; a router, once the weights are given."""
    return jnp.argmax(linear_values(weights, observation)).astype(jnp.int32)


@cache
def _shipped() -> dict[str, float]:
    return json.loads(UNIVERSAL.read_text(encoding="utf-8"))["weights"]


def universal_weights(features: tuple[str, ...] = RELATIVE_FEATURES) -> np.ndarray:
    """The universal router's weights float32 [Fe + 1] of these features, 0 for one that it does not know, and of
    dropping.
    """
    weights = _shipped()
    return np.array([*(weights.get(name, 0.0) for name in features), weights["drop"]], np.float32)


def universal(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The action with the highest value under a linear policy that was trained on random clusters (docs/universal.md).

    It reads the features "relative" from the state, whatever the environment observes. Where prompts share prefixes,
    these count what an expert is expected to hold as computed.
    """
    own = dataclasses.replace(env, obs="graph", queue_nodes=1, features="relative")
    weights = jnp.asarray(universal_weights(expert_features(own)))
    seen = own.observe(state, params).replace(action_mask=actions_among(env, state, params, among))
    return linear_policy(weights, key, seen, state, params)
