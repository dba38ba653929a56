"""The ring buffer: what it holds after it wrapped around, and what it samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.agent import replay_buffer
from jaxroute.errors import UserError

NUM_ENVS = 3


def observation(step: int) -> dict[str, jax.Array]:
    number = step * NUM_ENVS + jnp.arange(NUM_ENVS)
    return {"number": number, "pair": jnp.stack([number, -number], axis=1).astype(jnp.float32)}


def outcome(step: int) -> dict[str, jax.Array]:
    number = step * NUM_ENVS + jnp.arange(NUM_ENVS)
    return {"of": number, "odd": number % 2 == 1}


def test_wraps_around_and_samples_what_it_holds() -> None:
    buffer = replay_buffer.init(observation(0), outcome(0), 4 * NUM_ENVS)
    add, sample = jax.jit(replay_buffer.add, donate_argnums=0), jax.jit(replay_buffer.sample, static_argnums=2)
    for step in range(11):
        buffer = add(buffer, outcome(step), observation(step + 1))
        before, drawn, after = sample(buffer, jax.random.key(step), 400)
        held = np.arange(max(0, step - 3) * NUM_ENVS, (step + 1) * NUM_ENVS)
        assert set(np.unique(drawn["of"])) == set(held)
        # All leaves of a sample belong to the same transition, which leads from its step to the next.
        np.testing.assert_array_equal(drawn["odd"], drawn["of"] % 2 == 1)
        for observed, number in ((before, drawn["of"]), (after, drawn["of"] + NUM_ENVS)):
            np.testing.assert_array_equal(observed["number"], number)
            np.testing.assert_array_equal(observed["pair"], np.stack([number, -number], axis=1))
    assert int(buffer.rows_added) == 11
    counts = np.unique(sample(buffer, jax.random.key(99), 12_000)[1]["of"], return_counts=True)[1]
    assert counts.min() > 850 and counts.max() < 1150  # uniform: 1000 each, standard deviation 30


def test_is_written_in_place_and_holds_an_observation_once() -> None:
    observed, done = {"x": jnp.ones((NUM_ENVS, 1000))}, {"y": jnp.ones(NUM_ENVS)}
    buffer = replay_buffer.init(observed, done, 1000 * NUM_ENVS)
    add = jax.jit(replay_buffer.add, donate_argnums=0).lower(buffer, done, observed).compile()
    memory = add.memory_analysis()
    assert memory.alias_size_in_bytes > 12_000_000 and memory.temp_size_in_bytes < 100_000
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(buffer)) < 12_100_000


@pytest.mark.parametrize("capacity", [0, 2, 10])
def test_capacity_must_be_whole_rows(capacity: int) -> None:
    with pytest.raises(UserError, match=r"buffer_capacity: \d+ is not a multiple of num_envs = 3; \d+ would be"):
        replay_buffer.init(observation(0), outcome(0), capacity)
