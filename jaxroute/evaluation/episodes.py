"""Runs routers on the same fresh episodes, as one compiled program."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.metrics import summarize
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.environment.wrappers import Wrapper
from jaxroute.errors import UserError
from jaxroute.routers.choice import Router

EpisodeValues = dict[
    str, np.ndarray
]  # metric (see `metrics.summarize`) -> [episodes], or [episodes, N] for "expert_..."


def evaluate_routers(
    env: RoutingEnvironment | Wrapper,
    params: EnvParams,
    routers: dict[str, Router],
    episodes: int,
    seed: int,
    done: Callable[[str, EpisodeValues], None] = lambda name, values: None,
) -> dict[str, EpisodeValues]:
    """Router name -> exact metrics of `episodes` whole episodes. `done` is called with the result of each router.

    Episode e has the same requests for every router and in every call with the same `seed`: the requests depend only on
    the environment's keys, and routers use other keys. `env` may be in wrappers that keep the state as it is, such as
    `FiveValues`; other environments raise `UserError`.
    """
    # The penalty is part only of the reward, which is not reported.
    env = _replaced(env, metrics="exact", penalty="off")
    policies = [as_pytree(router) for router in routers.values()]
    keys = jax.random.split(jax.random.key(seed), episodes)
    results = {}
    for index, name in enumerate(routers):
        results[name] = jax.device_get(_program(env, policies, jnp.int32(index), keys, params))
        done(name, results[name])
    return results


def for_search(env: RoutingEnvironment, params: EnvParams, length: int) -> tuple[RoutingEnvironment, EnvParams]:
    """Both with episodes of at most `length` requests, and without what only evaluations and rewards need.

    Disturbances come at the same shares of the shorter episodes, so that what is found in them is prepared for all.
    """
    length = min(length, env.episode_length)
    if params.disturbances is not None:
        share = length / env.episode_length
        params = params.replace(disturbances=params.disturbances.shortened(share))  # type: ignore[attr-defined]
    return dataclasses.replace(env, metrics="histogram", penalty="off", episode_length=length), params


def _replaced(env: Any, **settings: Any) -> Any:
    """`env` with other settings of the `RoutingEnvironment` that it is, or that is inside of it."""
    if isinstance(env, RoutingEnvironment):
        return dataclasses.replace(env, **settings)
    if isinstance(env, Wrapper):
        return dataclasses.replace(env, env=_replaced(env.env, **settings))
    raise UserError(f"routers are evaluated on a RoutingEnvironment or a Wrapper of one, not on {type(env).__name__}")


def as_pytree(router: Router) -> Router:
    """`router` as an argument of a program: a pytree is returned unchanged, and a plain function becomes a `Partial`.

    Inside another `Partial` a router would be a constant, so other network parameters would need another program.
    """
    return jax.tree_util.Partial(router) if jax.tree_util.all_leaves([router]) else router


def run_episodes(
    env: RoutingEnvironment, policies: list[Router], which: jax.Array, keys: jax.Array, params: EnvParams
) -> dict[str, jax.Array]:
    """Metrics of one episode per key."""
    return follow_episodes(env, policies, which, keys, params)[0]


def follow_episodes(
    env: RoutingEnvironment,
    policies: list[Router],
    which: jax.Array,
    keys: jax.Array,
    params: EnvParams,
    note: Callable[..., Any] = lambda request, action, elapsed: None,
) -> tuple[dict[str, jax.Array], Any]:
    """Metrics of one episode per key under policy `which` (int32 []), and [T, episodes] of what `note` returns.

    `which` has no batch axis, so `switch` runs only that policy. The arrival of decision d has the key
    `fold_in(environment's key, d)`. A policy with `knows_future` receives that key of the environment.
    """
    env_keys, router_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    # `switch` hashes its branches, and a pytree with traced leaves cannot be hashed.
    branches = [
        lambda own, env_key, *inputs, policy=policy: policy(
            env_key if getattr(policy, "knows_future", False) else own, *inputs
        )
        for policy in policies
    ]
    route = jax.vmap(partial(jax.lax.switch, which, branches), (0, 0, 0, 0, None))

    def step(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        observation, before = carry
        actions = route(fold_in(router_keys, index), env_keys, observation, before, params)
        step_keys = fold_in(env_keys, index)
        observation, state, *_, info = jax.vmap(env.step, (0, 0, 0, None))(step_keys, before, actions, params)
        return (observation, state), note(before.request, actions, info["elapsed"])

    observation, state = jax.vmap(env.reset, (0, None))(fold_in(env_keys, env.episode_length), params)
    if not isinstance(state, EnvState):
        raise UserError(
            f"the state of {type(env).__name__} is a {type(state).__name__}, which routers cannot read; use the "
            "environment inside"
        )
    # The totals of an episode are complete after its last step, where the scan ends.
    (_, state), notes = jax.lax.scan(step, (observation, state), jnp.arange(env.episode_length))
    return jax.vmap(partial(summarize, level=env.metrics))(state.totals), notes


# One function per process, so that calls with the same environment and routers compile it once.
_program = jax.jit(run_episodes, static_argnums=0)
