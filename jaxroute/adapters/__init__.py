"""Environments with the interfaces of other libraries: gymnax, gymnasium and Stable-Baselines3.

Each adapter needs its extra, for example `pip install 'jaxroute[gymnax]'`, and is imported when it is used. No other
part of jaxroute imports this folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxroute.errors import UserError

if TYPE_CHECKING:
    from jaxroute.adapters.gymnasium import GymnasiumEnv, GymnasiumVectorEnv
    from jaxroute.adapters.gymnax import GymnaxEnvironment, GymnaxParams
    from jaxroute.adapters.stable_baselines3 import StableBaselines3VecEnv


def to_gymnax(env: Any, params: Any, five_values: bool | None = None) -> tuple[GymnaxEnvironment, GymnaxParams]:
    """A subclass of gymnax's `Environment`, and its parameters, as `gymnax.make` returns them.

    `five_values`: whether `step` returns (observation, state, reward, done, info) instead of (observation, state,
    reward, terminated, truncated, info). None selects the installed gymnax's view: six values from 1.0 on. rejax 0.1
    needs five. Raises `UserError` if gymnax is not installed.
    """
    return _module("gymnax").to_gymnax(env, params, five_values)


def to_gymnasium(env: Any, params: Any) -> GymnasiumEnv:
    """A `gymnasium.Env`, without automatic reset. Raises `UserError` if gymnasium is not installed."""
    return _module("gymnasium").GymnasiumEnv(env, params)


def to_gymnasium_vector(env: Any, params: Any, num_envs: int) -> GymnasiumVectorEnv:
    """A `gymnasium.vector.VectorEnv` of `num_envs` environments in one program, with `AutoresetMode.SAME_STEP`.

    Raises `UserError` if gymnasium is not installed.
    """
    return _module("gymnasium").GymnasiumVectorEnv(env, params, num_envs)


def to_stable_baselines3(env: Any, params: Any, num_envs: int) -> StableBaselines3VecEnv:
    """A `VecEnv` of Stable-Baselines3 with `num_envs` environments in one program.

    Raises `UserError` if stable-baselines3 is not installed.
    """
    return _module("stable_baselines3", extra="sb3").StableBaselines3VecEnv(env, params, num_envs)


def _module(name: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(f"jaxroute.adapters.{name}")
    except ModuleNotFoundError as error:
        remedy = f"pip install 'jaxroute[{extra or name}]'"
        raise UserError(f"this adapter needs the package {error.name}, which is not installed: {remedy}") from error
