"""rejax's own agents, with its own evaluation, on the adapter. `make compat` has an environment with nothing else."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxroute import adapters
from tests.adapting import EPISODE, small

rejax = pytest.importorskip("rejax", reason="rejax is not in the extra dev; make compat tests it")

SIZES = {"num_envs": 2, "total_timesteps": 32, "eval_freq": 16}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("PPO", {"num_steps": 4, "num_minibatches": 2, "normalize_observations": True}),
        ("SAC", {"buffer_size": 32, "fill_buffer": 8, "batch_size": 4}),
        ("DQN", {"buffer_size": 32, "fill_buffer": 8, "batch_size": 4}),
    ],
)
def test_agents_train_as_they_are(algorithm, options):
    env, params = adapters.to_gymnax(*small(metrics="off"), five_values=True)
    agent = getattr(rejax, algorithm).create(env=env, env_params=params, **SIZES, **options)
    _, (lengths, returns) = jax.jit(agent.train)(jax.random.PRNGKey(0))
    assert (np.asarray(lengths) == EPISODE).all() and np.isfinite(returns).all()
