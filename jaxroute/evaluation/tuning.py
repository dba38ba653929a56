"""The numbers of routers that have some to tune: the best of a small grid, on short episodes of their own."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import run_episodes
from jaxroute.routers import make_router

Numbers = dict[str, float | int]

TUNED = ("latency_based", "routellm", "score_minus_load")
"""Routers with numbers to tune."""

_WEIGHTS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.2, 0.5)
_BUFFERS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
_THRESHOLDS = (-0.2, -0.1, -0.05, -0.025, 0.0, 0.025, 0.05, 0.1, 0.2)
_EPISODES, _LENGTH, _KEY = 4, 1000, 0x74756E65


def tune(name: str, env: RoutingEnvironment, params: EnvParams) -> Numbers:
    """The numbers of the grid of the router `name` with the highest mean QoS in this scenario; none but for `TUNED`.

    `params` are traced: another rate or limit costs no compilation. The episodes are shorter than the evaluation's, and
    of a key that no evaluation seed gives.
    """
    if name not in TUNED:
        return {}
    grid = _grid(name, env.num_experts)
    env = dataclasses.replace(env, metrics="histogram", penalty="off", episode_length=min(_LENGTH, env.episode_length))
    columns = {key: jnp.asarray([point[key] for point in grid]) for key in grid[0]}
    best = int(np.argmax(_qos(name, env, columns, params)))
    return grid[best]


def _grid(name: str, num_experts: int) -> list[Numbers]:
    if name == "score_minus_load":
        return [{"weight": weight} for weight in _WEIGHTS]
    if name == "latency_based":
        return [{"buffer": buffer} for buffer in _BUFFERS]
    # The margin of the one pair order is the other's with its sign turned.
    pairs = list(combinations(range(num_experts), 2)) or [(0, 0)]
    return [
        {"threshold": threshold, "strong": strong, "weak": weak}
        for (strong, weak), threshold in product(pairs, _THRESHOLDS)
    ]


@partial(jax.jit, static_argnames=("name", "env"))
def _qos(name: str, env: RoutingEnvironment, columns: dict[str, jax.Array], params: EnvParams) -> jax.Array:
    """float [G]: mean QoS with each of G settings, on the same episodes."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), _KEY), _EPISODES)

    def one(numbers: dict[str, jax.Array]) -> jax.Array:
        router = make_router(name, env, **numbers)
        return run_episodes(env, [router], jnp.int32(0), keys, params)["qos"].mean()

    return jax.vmap(one)(columns)
