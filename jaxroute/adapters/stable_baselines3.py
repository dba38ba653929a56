"""Stable-Baselines3: its vector environment, `VecEnv`, which differs from gymnasium's."""

# pyright: basic, reportMissingImports=false
# The library is not installed when types are checked.
from typing import Any

import jax
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from jaxroute.adapters.gymnasium import gymnasium_space
from jaxroute.adapters.host import HostBatch


class StableBaselines3VecEnv(VecEnv):
    """`num_envs` environments in one program; a reset without `seed` draws seeds from the operating system.

    infos[i] has "action_mask" (int8 [N + 1]), "qos", "penalty", "elapsed" and "TimeLimit.truncated"; at the end of an
    episode also "terminal_observation" and "metrics". "action_mask" always belongs to the returned observation.
    """

    def __init__(self, env: Any, params: Any, num_envs: int) -> None:
        self._batch = HostBatch(env, params, num_envs)
        self._masks: Any = None
        super().__init__(num_envs, gymnasium_space(env.observation_space()), gymnasium_space(env.action_space()))

    def reset(self) -> Any:
        """The first observations [num_envs, ...], or a dict of them."""
        drawn = np.random.SeedSequence().generate_state(self.num_envs).tolist()
        seeds = [own if seed is None else seed for seed, own in zip(self._seeds, drawn, strict=True)]
        self._reset_seeds()
        self._reset_options()
        observation, info = self._batch.reset(seeds)
        self.reset_infos = self._rows(info)
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps `actions` (int [num_envs]) for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """(observations, rewards float [num_envs], dones bool [num_envs], infos) of the actions of `step_async`.

        Where an episode is done, the observation is the next episode's.
        """
        step = self._batch.step(self._actions)
        infos = self._rows(step.info | {"TimeLimit.truncated": step.truncated & ~step.terminated})
        done = step.terminated | step.truncated
        if step.final_info is not None:
            last = {"terminal_observation": step.final_observation}
            if "metrics" in step.final_info:
                last["metrics"] = step.final_info["metrics"]
            for index in np.flatnonzero(done):
                infos[index] |= jax.tree.map(lambda leaf, index=index: leaf[index], last)
        return step.observation, step.reward, done, infos

    def close(self) -> None:
        """Does nothing, as there is nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """ "params", "action_masks" (for sb3-contrib's maskable agents), or an attribute of the environment."""
        return [self._attribute(attr_name, index) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets "params" of all environments; an environment itself cannot be changed."""
        if attr_name != "params" or len(list(self._get_indices(indices))) != self.num_envs:
            raise AttributeError(f"{attr_name} cannot be set: only params can, and of all environments together")
        self._batch.params = value

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """What the method of the environment returns, for each of `indices`."""
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """False: there are no gymnasium wrappers inside."""
        return [False for _ in self._get_indices(indices)]

    def _rows(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """One dict per environment. Also stores the action masks."""
        self._masks = info.get("action_mask")
        columns = [value if value.ndim > 1 else value.tolist() for value in info.values()]
        return [dict(zip(info, row, strict=True)) for row in zip(*columns, strict=True)]

    def _attribute(self, name: str, index: int) -> Any:
        if name == "render_mode":
            return None
        if name == "params":
            return self._batch.params
        if name == "action_masks":
            return lambda: self._masks[index].astype(bool)
        return getattr(self._batch.env, name)
