"""gymnax: a subclass of its `Environment` with its spaces, for gymnax 0.0.9 and 1.x."""

# pyright: basic, reportMissingImports=false
# The library is not installed when types are checked.
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

from jaxroute.environment.spaces import Dict as DictSpace
from jaxroute.environment.spaces import Discrete, Space
from jaxroute.environment.wrappers import FiveValues

# From 1.0 on, gymnax reports truncation, and step returns six values; before, it returns five.
SIX_VALUES = hasattr(environment.Environment, "is_truncated")


@struct.dataclass
class GymnaxParams(environment.EnvParams):
    """The parameters of the environment, traced, and the parameter that every gymnax environment has."""

    max_steps_in_episode: int = struct.field(pytree_node=False, default=1)  # libraries read it; it has no effect
    params: Any = None


class GymnaxEnvironment(environment.Environment):
    """`env` with gymnax's interface. `reset` and `step` are those of the environment, which resets automatically.

    info is that of the environment, with "terminated", "truncated" (bool []) and "final_observation" as in gymnax 1.x,
    and "discount" (float [], 0 if terminated, else 1) as in gymnax before 1.0.
    """

    def __init__(self, env: Any, params: GymnaxParams, five_values: bool) -> None:
        self.env, self._params, self.five_values = env, params, five_values

    @property
    def default_params(self) -> GymnaxParams:
        """The parameters that a call without `params` takes."""
        return self._params

    @property
    def num_actions(self) -> int:
        """N + 1: the experts, then drop."""
        return self.env.num_actions

    def reset(self, key: jax.Array, params: GymnaxParams | None = None) -> tuple[Any, Any]:
        """(observation, state) of a new episode."""
        return _reset(self.env, key, (params or self._params).params)

    reset_env = reset

    def step(self, key: jax.Array, state: Any, action: Any, params: GymnaxParams | None = None) -> tuple[Any, ...]:
        """Six or five values (see `five_values`); at the end of an episode, those after the reset."""
        values = _step(FiveValues(self.env), key, state, action, (params or self._params).params)
        observation, state, reward, done, info = values
        if self.five_values:
            return observation, state, reward, done, info
        return observation, state, reward, info["terminated"], info["truncated"], info

    def step_env(self, *_: Any) -> Any:
        """Raises: gymnax's `step` without its reset, which these environments do not have."""
        raise NotImplementedError("jaxroute environments reset by themselves; call step, which does not reset again")

    def get_obs(self, state: Any, params: GymnaxParams | None = None, key: jax.Array | None = None) -> Any:
        """The observation of a state that `reset` or `step` returned."""
        return self.env.observe(state, (params or self._params).params)

    def is_terminal(self, state: Any, params: GymnaxParams) -> jax.Array:
        """False, bool []: no state that `reset` or `step` returns is at the end of an episode."""
        return jnp.bool_(False)

    is_terminated = is_truncated = is_terminal

    def action_space(self, params: GymnaxParams | None = None) -> spaces.Discrete:
        """0..N, as gymnax's `Discrete`; `params` change nothing."""
        return _space(self.env.action_space())

    def observation_space(self, params: GymnaxParams | None = None) -> spaces.Box | spaces.Dict:
        """That of the environment in gymnax's classes; `params` change nothing."""
        return _space(self.env.observation_space())


# Compiled like gymnax's reset and step. Default parameters are never constants, which would round differently.
@partial(jax.jit, static_argnums=0)
def _reset(env: Any, key: jax.Array, params: Any) -> tuple[Any, Any]:
    return env.reset(key, params)


@partial(jax.jit, static_argnums=0)
def _step(env: FiveValues, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, ...]:
    return env.step(key, state, action, params)


def to_gymnax(env: Any, params: Any, five_values: bool | None) -> tuple[GymnaxEnvironment, GymnaxParams]:
    """See `jaxroute.adapters.to_gymnax`."""
    own = GymnaxParams(max_steps_in_episode=env.episode_length, params=params)
    return GymnaxEnvironment(env, own, not SIX_VALUES if five_values is None else five_values), own


def _space(own: Space) -> Any:
    if isinstance(own, Discrete):
        return spaces.Discrete(own.n)
    if isinstance(own, DictSpace):
        space = spaces.Dict({name: _space(part) for name, part in own.spaces.items()})
    else:
        space = spaces.Box(own.low, own.high, own.shape, own.dtype)
    # gymnax's spaces sample NaN between infinite bounds, and dictionaries instead of other observations.
    space.sample, space.contains = own.sample, own.contains
    return space
