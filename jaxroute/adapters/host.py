"""Steps several environments in one program, for libraries without JAX: inputs and outputs are NumPy arrays."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.metrics import EpisodeTotals, Level, summarize
from jaxroute.environment.spaces import Dict, observation_space
from jaxroute.errors import UserError

Info = dict[str, Any]
"""Name -> [B, ...]: "action_mask" (int8 [B, N + 1], as in gymnasium); after a step "qos", "penalty", "elapsed"."""


class Step(NamedTuple):
    """One step of B environments; those that ended have been reset."""

    observation: Any  # array [B, ...], or a dict of them
    info: Info
    reward: np.ndarray  # float [B]
    terminated: np.ndarray  # bool [B]
    truncated: np.ndarray  # bool [B]
    final_observation: Any  # before the resets; it and final_info are None if no episode ended
    final_info: Info | None  # with "metrics", a dict of [B, ...], unless metrics are off


class HostBatch:
    """`num_envs` equal environments with their states. They can be pickled and copied at any time.

    The random numbers of every environment come from its own seed, so they do not depend on `num_envs`.
    """

    def __init__(self, env: Any, params: Any, num_envs: int) -> None:
        _processes.add(os.getpid())
        self.env, self.params, self.num_envs = env, params, num_envs
        self._observation = self._state = None
        self._seeds, self._steps = np.zeros((2, num_envs), np.uint32)

    @property
    def started(self) -> bool:
        """Whether `reset` has been called."""
        return self._state is not None

    def reset(self, seeds: Sequence[int], rows: np.ndarray | None = None) -> tuple[Any, Info]:
        """(observation, info) of new episodes; `seeds` are taken modulo 2^32. `rows` (bool [B]): only these begin one,
        and only their info has a meaning."""
        _check_process()
        new = np.asarray([seed % 2**32 for seed in seeds], np.uint32), np.zeros(self.num_envs, np.uint32)
        (observation, info), state = _reset(self.env, new[0], self.params)
        new = (*new, observation, state)
        if rows is not None and not rows.all():
            old = (self._seeds, self._steps, self._observation, self._state)
            choose = lambda one, other: np.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)  # noqa: E731
            new = jax.tree.map(choose, new, old)
        self._seeds, self._steps, self._observation, self._state = new
        return _numpy(self._observation), _numpy(info)

    def step(self, actions: Any) -> Step:
        """Steps all environments; `actions` are integers [B]."""
        _check_process()
        actions = np.asarray(actions)
        if actions.size != self.num_envs or actions.dtype.kind not in "iu":
            got = f"{actions.dtype}{list(actions.shape)}"
            raise ValueError(f"actions must be a whole number for each of {self.num_envs} environments, not {got}")
        # Numbers outside of int32 would become other actions.
        actions = actions.astype(np.int64).clip(-1, self.env.num_actions).astype(np.int32)
        steps = self._steps + np.uint32(1)
        seen, final, totals, state = _step(
            self.env, self._seeds, steps, self._state, actions.reshape(self.num_envs), self.params
        )
        self._steps, self._observation, self._state = steps, seen[0], state
        observation, info, reward, terminated, truncated = _numpy(seen)
        final_observation = final_info = None
        if (terminated | truncated).any():
            final_observation, final_info = _numpy(final)
            if totals is not None:
                final_info["metrics"] = _numpy(_summaries(totals, self.env.metrics))
        return Step(observation, info, reward, terminated, truncated, final_observation, final_info)


@partial(jax.jit, static_argnums=0)
def _reset(env: Any, seeds: jax.Array, params: Any) -> tuple[Any, Any]:
    observation, state = jax.vmap(env.reset, (0, None))(_keys(seeds, jnp.zeros_like(seeds)), params)
    return _seen(env, observation), state


@partial(jax.jit, static_argnums=0)
def _step(env: Any, seeds: jax.Array, counts: jax.Array, state: Any, actions: jax.Array, params: Any) -> Any:
    values = jax.vmap(env.step, (0, 0, 0, None))(_keys(seeds, counts), state, actions, params)
    observation, state, reward, terminated, truncated, info = values
    own = {name: info[name] for name in ("qos", "penalty", "elapsed")}
    observation, shown = _seen(env, observation)
    final, final_shown = _seen(env, info["final_observation"])
    seen = (observation, {**shown, **own}, reward, terminated, truncated)
    return seen, (final, {**final_shown, **own}), info["episode"], state


def _keys(seeds: jax.Array, counts: jax.Array) -> jax.Array:
    """Keys: 0 of a reset, n of the n-th step after it. All are made by `fold_in` of the seed's key, since `split` and
    `fold_in` of one key may give equal keys."""
    return jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(seeds, counts)


@partial(jax.jit, static_argnums=1)
def _summaries(totals: EpisodeTotals, level: Level) -> dict[str, jax.Array]:
    return jax.vmap(partial(summarize, level=level))(totals)


def _seen(env: Any, observation: Any) -> tuple[Any, dict[str, jax.Array]]:
    """An observation [B, ...] as an array or a dict of arrays with masks as int8; and its action mask, if it has one.

    The mask of an observation that a wrapper changed is unknown.
    """
    space, mask = env.observation_space(), None
    if space == observation_space(env):
        mask = observation[:, -env.num_actions :] if env.obs == "flat" else observation.action_mask
    if isinstance(space, Dict):
        parts = observation if isinstance(observation, Mapping) else vars(observation)
        observation = {name: part.astype(jnp.int8) if part.dtype == bool else part for name, part in parts.items()}
    return observation, {} if mask is None else {"action_mask": mask.astype(jnp.int8)}


_processes: set[int] = set()
"""Processes that made a batch: this one, and those that it is a fork of."""


def _check_process() -> None:
    """Raises where JAX would wait forever, as the threads of its process do not exist in a fork. In the constructor it
    would be too early: gymnasium's worker reports only errors of `reset` and `step`."""
    if _processes - {os.getpid()}:
        raise UserError(
            "this process is a fork of one that used JAX, which hangs in forks; start it with the method 'spawn', as "
            "AsyncVectorEnv(..., context='spawn') or SubprocVecEnv(..., start_method='spawn') does"
        )


def row(tree: Any, index: int) -> Any:
    """What one environment has of arrays [B, ...]: arrays, and Python's numbers where nothing else is left."""
    return jax.tree.map(lambda leaf: leaf[index] if leaf.ndim > 1 else leaf[index].item(), tree)


def _numpy(tree: Any) -> Any:
    """Copies of the arrays, which may be written to."""
    return jax.tree.map(np.array, jax.device_get(tree))
