"""gymnasium: one environment as `Env`, or several in one program as `VectorEnv`."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from jaxroute.adapters.host import HostBatch, row
from jaxroute.environment.spaces import Box, Discrete, Space


def gymnasium_space(own: Space) -> gymnasium.Space[Any]:
    """The gymnasium space for a space; masks are `MultiBinary`, with dtype int8."""
    if isinstance(own, Discrete):
        return gymnasium.spaces.Discrete(own.n)
    if isinstance(own, Box):
        if own.dtype == bool:
            return gymnasium.spaces.MultiBinary(own.shape)
        return gymnasium.spaces.Box(own.low, own.high, own.shape, own.dtype.type)
    return gymnasium.spaces.Dict({name: gymnasium_space(part) for name, part in own.spaces.items()})


class Seeds:
    """The random generators of several environments, each like the one of gymnasium's `Env`: it begins with the last
    seed that was given, or with one from the operating system, and resets without a seed draw from it."""

    def __init__(self, count: int) -> None:
        self.each = [seeding.np_random() for _ in range(count)]  # generators, and the seeds that they began with

    def draw(self, given: Sequence[int | None], rows: np.ndarray) -> list[int]:
        """The seeds of a reset: those `given`, and a number of its generator for every None. Where `rows` (bool [B]) is
        False, the seed has no meaning and the generator stays."""
        given = [seed if takes else 0 for seed, takes in zip(given, rows, strict=True)]
        # The generators change only if all seeds are valid.
        begun = [None if seed is None else seeding.np_random(seed) for seed in given]
        self.each = [new if new and takes else own for own, new, takes in zip(self.each, begun, rows, strict=True)]
        pairs = zip(self.each, given, strict=True)
        return [int(own.integers(2**32)) if seed is None else seed for (own, _), seed in pairs]


class GymnasiumEnv(gymnasium.Env):
    """`env` as `gymnasium.Env`: the end of an episode returns its last observation, and `reset` begins the next.

    info has "action_mask" (int8 [N + 1]), "qos", "penalty" and "elapsed" (docs/environment.md), and at the end of an
    episode "metrics", the result of `summarize`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, env: Any, params: Any) -> None:
        self._batch = HostBatch(env, params, 1)
        self._next: Any = None  # at the end of an episode, the first observation and info of the next one
        self.observation_space = gymnasium_space(env.observation_space())
        self.action_space = gymnasium_space(env.action_space())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """(observation, info) of a new episode. `seed` begins a new sequence of episodes; there are no `options`."""
        super().reset(seed=seed)
        first = self._next
        if seed is not None or first is None:
            first = self._batch.reset([int(self.np_random.integers(2**32)) if seed is None else seed])
        self._next = None
        return row(first, 0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Sends the request by `action` (0 to N): (observation, reward, terminated, truncated, info)."""
        if not self._batch.started or self._next is not None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        step = self._batch.step([action])
        last = step.observation, step.info
        if step.final_info is not None:
            last, self._next = (step.final_observation, step.final_info), _first(last)
        observation, info = row(last, 0)
        return observation, float(step.reward[0]), bool(step.terminated[0]), bool(step.truncated[0]), info


class GymnasiumVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` environments in one program. Environment i with seed s is `GymnasiumEnv` with seed s + i.

    The last observation and info of an episode are in info["final_obs"] and info["final_info"], as in gymnasium's
    `SyncVectorEnv`. Every entry of info has a mask, whose name is the entry's with a leading underscore.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env: Any, params: Any, num_envs: int) -> None:
        self._batch, self._seeds, self.num_envs = HostBatch(env, params, num_envs), Seeds(num_envs), num_envs
        self.single_observation_space = gymnasium_space(env.observation_space())
        self.single_action_space = gymnasium_space(env.action_space())
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The generator of each environment, as in `SyncVectorEnv`."""
        return tuple(generator for generator, _ in self._seeds.each)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The seed that each of `np_random` began with."""
        return tuple(seed for _, seed in self._seeds.each)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(observations, info) of new episodes in all environments.

        `seed` is that of the first environment, from which the others count up; or one seed for each, or None. Of
        `options`, "reset_mask" (bool [num_envs]) selects the environments that are reset, as in `SyncVectorEnv`.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else seed + index for index in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed has {len(seeds)} seeds, but num_envs is {self.num_envs}")
        everywhere = np.ones(self.num_envs, bool)
        rows = (options or {}).get("reset_mask", everywhere)
        if not isinstance(rows, np.ndarray) or rows.shape != everywhere.shape or rows.dtype != bool or not rows.any():
            raise ValueError(f"reset_mask must be a NumPy array, bool [{self.num_envs}] with a True, not {rows!r}")
        if not (self._batch.started or rows.all()):
            raise gymnasium.error.ResetNeeded("reset all environments before some of them")
        observation, info = self._batch.reset(self._seeds.draw(seeds, rows), rows)
        return observation, _masked(info, rows)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Sends a request in each environment by `actions` (int [num_envs]); what it returns is [num_envs, ...].

        Where an episode ends, the observation is the next episode's.
        """
        if not self._batch.started:
            raise gymnasium.error.ResetNeeded("call reset before step")
        step = self._batch.step(actions)
        everywhere, ended = np.ones(self.num_envs, bool), step.terminated | step.truncated
        # The values of a step belong to the ended episode; the new one has only its mask, as after a reset.
        infos = {name: (value, everywhere if name == "action_mask" else ~ended) for name, value in step.info.items()}
        info = {key: value for name, pair in infos.items() for key, value in _masked({name: pair[0]}, pair[1]).items()}
        if step.final_info is not None:
            final = np.full(self.num_envs, None, object)
            for index in np.flatnonzero(ended):
                final[index] = jax.tree.map(lambda leaf, index=index: leaf[index], step.final_observation)
            info |= _masked({"final_obs": final, "final_info": step.final_info}, ended)
        return step.observation, step.reward.astype(float), step.terminated, step.truncated, info


def _first(seen: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The part of a resetting step's info that a reset returns."""
    observation, info = seen
    return observation, {name: value for name, value in info.items() if name == "action_mask"}


def _masked(info: dict[str, Any], present: np.ndarray) -> dict[str, Any]:
    """gymnasium's layout of the info of several environments: each entry, zero if absent, with a mask."""
    masked: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, dict):
            value = _masked(value, present)
        elif value.dtype != object:
            value = np.where(present.reshape(-1, *[1] * (value.ndim - 1)), value, np.zeros_like(value))
            value = value.astype(float) if value.ndim == 1 else value  # a Python number of each environment
        masked |= {name: value, f"_{name}": present.copy()}
    return masked
