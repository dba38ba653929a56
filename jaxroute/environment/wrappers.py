"""Wrappers: the base for one's own, and the view of a step that has five values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Wrapper:
    """An environment around another one, `env`: what it does not define is that one's.

    Subclasses override `reset` and `step`, and stay values: frozen dataclasses, so that they compare, hash, pickle and
    copy as environments do, and may be static arguments of `jax.jit`.
    """

    env: Any

    def __getattr__(self, name: str) -> Any:
        # While pickle or copy make one there is no `env` yet, and special methods are not the inner environment's.
        if name == "env" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """(observation, state) of a fresh episode."""
        return self.env.reset(key, params)

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
        """What the inner environment's step returns."""
        return self.env.step(key, state, action, params)


@dataclass(frozen=True)
class FiveValues(Wrapper):
    """The view of gymnax before 1.0, purejaxrl, rejax, Stoix and Craftax: `step` returns (observation, state, reward,
    done, info). The other view, of gymnax 1.x, is that of the environment itself.

    `done`, bool []: terminated or truncated. What that hides is in info: "terminated" and "truncated", bool [], and
    "discount", float []: 0 where terminated, else 1, so 1 at a truncation, where "final_observation" is what to
    bootstrap from.

    These libraries stack the info of every step of a rollout, the episode's totals included: with many environments,
    `make(..., metrics="off")` leaves them out.
    """

    def step(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any
    ) -> tuple[Any, Any, jax.Array, jax.Array, dict[str, Any]]:
        """(observation, state, reward, done, info) of the inner environment's step."""
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        discount = 1 - terminated.astype(jnp.result_type(reward))
        info = {**info, "terminated": terminated, "truncated": truncated, "discount": discount}
        return observation, state, reward, terminated | truncated, info
