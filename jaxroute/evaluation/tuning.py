"""Grid search over the parameters of tunable routers, on separate short episodes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import run_episodes
from jaxroute.routers import ROUTERS, Parameters, make_router

_EPISODES, _LENGTH, _KEY = 4, 1000, 0x74756E65


def tune(name: str, env: RoutingEnvironment, params: EnvParams) -> Parameters:
    """The setting in the grid of the router `name` with the highest mean QoS in this scenario; empty without a grid.

    `params` are traced, so another rate or limit needs no compilation. The episodes are shorter than those of the
    evaluation, and their key differs from that of every evaluation seed.
    """
    settings = ROUTERS[name].grid
    if settings is None:
        return {}
    grid = settings(env.num_experts)
    env = dataclasses.replace(env, metrics="histogram", penalty="off", episode_length=min(_LENGTH, env.episode_length))
    columns = {key: jnp.asarray([point[key] for point in grid]) for key in grid[0]}
    return grid[int(np.argmax(_qos(name, env, columns, params)))]


@partial(jax.jit, static_argnames=("name", "env"))
def _qos(name: str, env: RoutingEnvironment, columns: dict[str, jax.Array], params: EnvParams) -> jax.Array:
    """float [G]: mean QoS with each of G settings, on the same episodes."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), _KEY), _EPISODES)

    def one(parameters: dict[str, jax.Array]) -> jax.Array:
        router = make_router(name, env, **parameters)
        return run_episodes(env, [router], jnp.int32(0), keys, params)["qos"].mean()

    return jax.vmap(one)(columns)
