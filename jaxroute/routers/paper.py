"""The heuristics that the paper compares with (arXiv 2508.00234)."""

from typing import Any

import jax

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.routers.choice import smallest, turns_away


def round_robin(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The experts in turn, one per decision; if an expert is not allowed, the next allowed one takes its turn."""
    return smallest(turns_away(env, state), among)


def shortest_queue(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The expert with the fewest requests, running and waiting; ties go to the lowest index.

    Load balancers call this rule least outstanding requests or least connections. They count requests between beginning
    and end, which here run or wait (Envoy's LEAST_REQUEST over all hosts,
    https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/load_balancers).
    """
    return smallest(env.queue_lengths(state), among)


def bert_router(
    env: RoutingEnvironment, key: jax.Array, observation: Any, state: EnvState, params: EnvParams, among: jax.Array
) -> jax.Array:
    """The expert with the highest predicted score, whatever its load."""
    return smallest(-state.request.predicted_score, among)
