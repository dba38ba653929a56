"""A ring buffer of transitions that lives on the device, as pure functions of a pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.errors import UserError


@struct.dataclass
class ReplayBuffer:
    """Rows of transitions; a row holds the one transition that each environment made in one collection step.

    Whole rows are written, so an add is one slice update in place. The counter does not depend on what is stored:
    keep it unbatched when seeds are vmapped (`trainer.TRAIN_STATE_AXES`), or the slice update becomes a scatter.

    Memory per transition is twice the observation (the true next one is stored too, as the row after a truncation
    starts another episode) and 9 bytes: with 10 shown requests in each queue about 3.2 kB for 3 experts, 6.3 kB for 6.
    """

    rows: Any  # traced: pytree of transitions, each leaf [capacity / num_envs, num_envs, ...]
    rows_added: jax.Array  # traced: int32 [], rows written since the start, those overwritten included


def init(example_batch: Any, capacity: int) -> ReplayBuffer:
    """An empty buffer of `capacity` transitions.

    `example_batch` is one row, each leaf [num_envs, ...]; only its shapes and dtypes are used. Raises UserError where
    capacity is not a positive multiple of num_envs.
    """
    num_envs = jax.tree.leaves(example_batch)[0].shape[0]
    if capacity < num_envs or capacity % num_envs:
        nearest = max(capacity // num_envs, 1) * num_envs
        raise UserError(f"buffer_capacity: {capacity} is not a multiple of num_envs = {num_envs}; {nearest} would be")
    return ReplayBuffer(
        rows=jax.tree.map(lambda x: jnp.zeros((capacity // num_envs, *x.shape), x.dtype), example_batch),
        rows_added=jnp.zeros((), jnp.int32),
    )


def add(buffer: ReplayBuffer, batch: Any) -> ReplayBuffer:
    """Writes one row, each leaf of `batch` [num_envs, ...], over the oldest one once the buffer is full."""
    num_rows = jax.tree.leaves(buffer.rows)[0].shape[0]
    cursor = buffer.rows_added % num_rows
    rows = jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, cursor, 0), buffer.rows, batch)
    return ReplayBuffer(rows=rows, rows_added=buffer.rows_added + 1)


def sample(buffer: ReplayBuffer, key: jax.Array, batch_size: int) -> Any:
    """`batch_size` transitions drawn uniformly with replacement, each leaf [batch_size, ...].

    At least one row must have been added: an empty buffer yields zeros.
    """
    num_rows, num_envs = jax.tree.leaves(buffer.rows)[0].shape[:2]
    stored = jnp.minimum(buffer.rows_added, num_rows) * num_envs
    index = jax.random.randint(key, (batch_size,), 0, stored)
    return jax.tree.map(lambda x: x[index // num_envs, index % num_envs], buffer.rows)
