"""Stable-Baselines3: its vector environment, `VecEnv`, which differs from gymnasium's."""

# pyright: basic, reportMissingImports=false
# The library is not installed when types are checked.
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from jaxroute.adapters.gymnasium import Seeds, gymnasium_space
from jaxroute.adapters.host import HostBatch, row


class StableBaselines3VecEnv(VecEnv):
    """`num_envs` environments in one program, with the seeds of `DummyVecEnv` over as many `GymnasiumEnv`.

    infos[i] has "action_mask" (int8 [N + 1]), "qos", "penalty", "elapsed" and "TimeLimit.truncated"; at the end of an
    episode also "terminal_observation" and "metrics". "action_mask" always belongs to the returned observation.
    """

    def __init__(self, env: Any, params: Any, num_envs: int) -> None:
        self._batch, self._generators = HostBatch(env, params, num_envs), Seeds(num_envs)
        self._masks: Any = None
        super().__init__(num_envs, gymnasium_space(env.observation_space()), gymnasium_space(env.action_space()))

    def reset(self) -> Any:
        """The first observations [num_envs, ...], or a dict of them."""
        observation, info = self._batch.reset(self._generators.draw(self._seeds, np.ones(self.num_envs, bool)))
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = self._rows(info)
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps `actions` (int [num_envs]) for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """(observations, rewards float [num_envs], dones bool [num_envs], infos) of the actions of `step_async`.

        Where an episode is done, the observation is the next episode's.
        """
        if not self._batch.started:
            raise gymnasium.error.ResetNeeded("call reset before step")
        step = self._batch.step(self._actions)
        infos = self._rows(step.info | {"TimeLimit.truncated": step.truncated & ~step.terminated})
        done = step.terminated | step.truncated
        if step.final_info is not None:
            last = {"terminal_observation": step.final_observation}
            if "metrics" in step.final_info:
                last["metrics"] = step.final_info["metrics"]
            for index in np.flatnonzero(done):
                infos[index] |= row(last, index)
                self.reset_infos[index] = {
                    name: infos[index][name] for name in ("action_mask",) if name in infos[index]
                }
        return step.observation, step.reward.astype(np.float32), done, infos

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
        return [row(info, index) for index in range(self.num_envs)]

    def _attribute(self, name: str, index: int) -> Any:
        if name == "render_mode":
            return None
        if name == "params":
            return self._batch.params
        if name == "action_masks":
            return lambda: self._masks[index].astype(bool)
        return getattr(self._batch.env, name)
