"""Hyperparameters and shapes of the learner for tests: these, but for what a test names."""

from __future__ import annotations

from typing import Any

from jaxroute.agent.sac import Hyperparameters
from jaxroute.agent.trainer import SACConfig


def hyperparameters(**changes: Any) -> Hyperparameters:
    values = dict(
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        alpha_learning_rate=3e-4,
        gamma=0.99,
        tau=0.005,
        target_entropy_ratio=0.5,
        initial_temperature=0.05,
        max_grad_norm=10.0,
        warmup_frames=0,
        reward_centering_rate=1e-3,
        final_learning_rate=1.0,
        decay_updates=1,
        critics_first=0.0,
    )
    return Hyperparameters(**{**values, **changes})


def sac_config(**changes: int) -> SACConfig:
    values = dict(num_envs=8, buffer_capacity=1600, batch_size=64, updates_per_step=1, steps_per_chunk=30)
    return SACConfig(**{**values, **changes})
