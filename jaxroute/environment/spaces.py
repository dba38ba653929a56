"""Spaces of actions and observations: shapes, dtypes and ranges. They need no other library.

The adapters convert them to the classes of gymnax or gymnasium. `sample` and `contains` work inside `jax.jit` and
`jax.vmap`. Shapes and dtypes are static, so `contains` is a constant False for a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.observation import (
    ARRIVED_FEATURES,
    REQUEST_FEATURES,
    FullGraphObservation,
    GraphObservation,
    expert_features,
)
from jaxroute.environment.settings import Settings


class Discrete:
    """The integers 0..n - 1."""

    def __init__(self, n: int, dtype: Any = jnp.int32) -> None:
        self.n, self.shape, self.dtype = n, (), np.dtype(dtype)

    def sample(self, key: jax.Array) -> jax.Array:
        """A uniform sample."""
        return jax.random.randint(key, (), 0, self.n, self.dtype)

    def contains(self, value: Any) -> jax.Array:
        """bool []: whether `value` is an integer scalar of any width within the range."""
        array = jnp.asarray(value)
        if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
            return jnp.bool_(False)
        return (array >= 0) & (array < self.n)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Discrete) and (self.n, self.dtype) == (other.n, other.dtype)

    def __repr__(self) -> str:
        return f"Discrete({self.n})"


class Box:
    """Arrays of one shape and dtype between two inclusive bounds; for bool, False to True."""

    def __init__(self, low: Any, high: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
        """`low` and `high` are numbers or arrays that broadcast to `shape`; both may be infinite."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.low, self.high = (np.broadcast_to(np.asarray(bound, self.dtype), shape) for bound in (low, high))

    def sample(self, key: jax.Array) -> jax.Array:
        """Uniform between two finite bounds, exponential from one finite bound, normal without finite bounds."""
        if self.dtype == bool:
            return jax.random.bernoulli(key, 0.5, self.shape)
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        uniform = jax.random.uniform(key, self.shape, self.dtype)
        away = -jnp.log1p(-uniform)
        bounded_below, bounded_above = jnp.isfinite(low), jnp.isfinite(high)
        # Infinite bounds are replaced, so that branches which are not selected do not compute with them.
        low, high = jnp.where(bounded_below, low, 0), jnp.where(bounded_above, high, 0)
        inside = jnp.minimum(low + uniform * (high - low), high)
        one_sided = jnp.where(bounded_below, low + away, high - away)
        free = jax.random.normal(key, self.shape, self.dtype)
        either = jnp.where(bounded_below | bounded_above, one_sided, free)
        return jnp.where(bounded_below & bounded_above, inside, either).astype(self.dtype)

    def contains(self, value: Any) -> jax.Array:
        """bool []: whether shape and dtype are the space's, and all values are within the bounds (NaN is not)."""
        dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
        if np.shape(value) != self.shape or dtype != self.dtype:
            return jnp.bool_(False)
        array = jnp.asarray(value)
        return jnp.all((array >= self.low) & (array <= self.high))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Box)
            and (self.shape, self.dtype) == (other.shape, other.dtype)
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    def __repr__(self) -> str:
        low, high = (bound.min() if index == 0 else bound.max() for index, bound in enumerate((self.low, self.high)))
        return f"Box({low}, {high}, {self.shape}, {self.dtype})"


class Dict:
    """Named spaces. A value is a mapping, or an object with fields of these names."""

    def __init__(self, spaces: Mapping[str, Space], create: Callable[..., Any] = dict) -> None:
        """`create(**samples)` builds the result of `sample`."""
        self.spaces, self.create = dict(spaces), create

    def sample(self, key: jax.Array) -> Any:
        """What `create` makes of a sample of each space."""
        keys = jax.random.split(key, len(self.spaces))
        pairs = zip(self.spaces.items(), keys, strict=True)
        return self.create(**{name: space.sample(own) for (name, space), own in pairs})

    def contains(self, value: Any) -> jax.Array:
        """bool []: whether all parts are present, and each is in its space."""
        if isinstance(value, Mapping):
            parts = dict(value)
        else:
            parts = {name: getattr(value, name) for name in self.spaces if hasattr(value, name)}
        if parts.keys() != self.spaces.keys():
            return jnp.bool_(False)
        return jnp.all(jnp.stack([space.contains(parts[name]) for name, space in self.spaces.items()]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dict) and self.spaces == other.spaces

    def __repr__(self) -> str:
        return f"Dict({self.spaces!r})"


Space = Discrete | Box | Dict

FREE, SHARE, POSITIVE, USE = (-np.inf, np.inf), (0.0, 1.0), (0.0, np.inf), (0.0, 3.0)

RANGES = {
    "prompt_tokens": POSITIVE,
    "recent_load": SHARE,
    "kv_use": SHARE,
    "running": POSITIVE,
    "waiting": POSITIVE,
    "iteration_time": SHARE,
    "predicted_score": FREE,
    "predicted_tokens": POSITIVE,
    "predicted_latency": SHARE,
    "expected_qos": FREE,
    "impact": POSITIVE,
    "at_risk": SHARE,
    "joined_iteration_time": SHARE,
    "remaining_tokens": SHARE,
    "prefill_time": SHARE,
    "batch_use": USE,
    "batch_use_squared": USE,
    "latency_use": USE,
    "latency_use_squared": USE,
    "kv_ahead": USE,
    "kv_ahead_squared": USE,
    "demand": SHARE,
    "demand_squared": SHARE,
    "impact_by_demand": POSITIVE,
    "least_latency_use": USE,
    "prefill_ahead": SHARE,
    "slack_taken": SHARE,
    "generated_tokens": POSITIVE,
    "latency_so_far": SHARE,
    "prefix_share": SHARE,
}
"""Minimum and maximum of each feature of the observation."""


def observation_space(settings: Settings) -> Space:
    """A `Dict` that samples `RoutingGraph`s, or with flat observations a `Box`, float32 [F]."""
    experts, nodes = settings.num_experts, settings.queue_nodes
    full = nodes == "all"
    rows = settings.slots if full else nodes
    queues = ("queued",) if full else ("running", "waiting")

    def features(names: tuple[str, ...], *axes: int) -> Box:
        low, high = zip(*(RANGES[name] for name in names), strict=True)
        return Box(low, high, (*axes, len(names)))

    def mask(*axes: int) -> Box:
        return Box(False, True, axes, bool)

    spaces = {
        "arrived": features(ARRIVED_FEATURES),
        "expert": features(expert_features(settings), experts),
        **{name: features(REQUEST_FEATURES, experts, rows) for name in queues},
        "running_mask": mask(experts, rows),
        "waiting_mask": mask(experts, rows),
        "action_mask": mask(experts + 1),
    }
    if settings.obs == "graph":
        return Dict(spaces, FullGraphObservation if full else GraphObservation)
    # As `observation.flatten` orders them.
    low, high = (
        np.concatenate([np.asarray(getattr(space, bound), np.float32).ravel() for space in spaces.values()])
        for bound in ("low", "high")
    )
    return Box(low, high, low.shape)
