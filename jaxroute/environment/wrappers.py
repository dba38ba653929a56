"""Wrappers: a base class, and the view of a step with five values."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Wrapper:
    """An environment around another one, `env`, which provides every attribute that the wrapper does not define.

    Subclasses override `reset` and `step`. They must be frozen dataclasses: then they can be compared, hashed, pickled
    and copied like environments, and may be static arguments of `jax.jit`.
    """

    env: Any

    def __getattr__(self, name: str) -> Any:
        # While pickle or copy create a wrapper it has no `env`. Special methods are never the inner environment's.
        if name == "env" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """(observation, state) of a new episode."""
        return self.env.reset(key, params)

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
        """The result of the inner environment's step."""
        return self.env.step(key, state, action, params)


@dataclass(frozen=True)
class FiveValues(Wrapper):
    """The view of gymnax before 1.0, purejaxrl, rejax, Stoix and Craftax: `step` returns (observation, state, reward,
    done, info). The environment itself has the view of gymnax 1.x.

    `done`, bool [], is terminated or truncated. info has both: "terminated" and "truncated", bool [], and "discount",
    float [], which is 0 if terminated and otherwise 1. It is 1 at a truncation, where the learner should bootstrap from
    "final_observation".

    These libraries store the info of every step of a rollout, including the episode's totals. With many environments,
    `make(..., metrics="off")` leaves the totals out.
    """

    def step(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any
    ) -> tuple[Any, Any, jax.Array, jax.Array, dict[str, Any]]:
        """(observation, state, reward, done, info) of the inner environment's step."""
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        discount = 1 - terminated.astype(jnp.result_type(reward))
        info = {**info, "terminated": terminated, "truncated": truncated, "discount": discount}
        return observation, state, reward, terminated | truncated, info
