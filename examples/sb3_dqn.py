"""Stable-Baselines3's DQN, unchanged, on `paper-3`, compared with Round-Robin on the same held-out episodes.

    pip install 'jaxroute[sb3]'
    python examples/sb3_dqn.py            # QoS .700 after 150,000 steps, Round-Robin .590
    python examples/sb3_dqn.py --short    # a few seconds, learns nothing

The adapter is a `VecEnv`: all environments run as one program that returns NumPy arrays. Episodes end by truncation
only. DQN reads this from "TimeLimit.truncated" and bootstraps from "terminal_observation". `info["metrics"]` has the
QoS of an episode that ended. The scenario has 3 requests/s. The example took a minute on a busy two-core CPU
(Stable-Baselines3 2.9.2, torch 2.13.0, JAX 0.10.2, seed 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv

import jaxroute
from jaxroute.adapters import to_stable_baselines3


def qos(vec_env: VecEnv, act: Callable[[np.ndarray, int], np.ndarray]) -> float:
    """QoS per request of `act(observations, step)` over one episode per environment, the same ones in every call."""
    vec_env.seed(1_000_000)
    observations, done, step = vec_env.reset(), [False], 0
    while not done[0]:
        observations, _, done, infos = vec_env.step(act(observations, step))
        step += 1
    return float(np.mean([info["metrics"]["qos"] for info in infos]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps on a small cluster")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads cost more than they save in networks this small
    small = {"slots": 8, "queue_nodes": 2} if options.short else {}
    steps = 400 if options.short else 150_000

    env, params = jaxroute.make("paper-3", obs="flat", metrics="off", episode_length=250, **small)
    training = to_stable_baselines3(env, params, num_envs=16)
    agent = DQN(
        "MlpPolicy",
        training,
        gamma=0.97,
        learning_rate=5e-4,
        buffer_size=50_000,
        learning_starts=steps // 50,
        batch_size=128,
        train_freq=1,
        target_update_interval=1000,
        exploration_fraction=0.3,
        exploration_final_eps=0.02,
        seed=options.seed,
    )
    agent.learn(steps)

    env, params = jaxroute.make("paper-3", obs="flat", episode_length=50 if options.short else 1000, **small)
    held_out = to_stable_baselines3(env, params, num_envs=16)
    trained = qos(held_out, lambda observations, step: agent.predict(observations, deterministic=True)[0])
    round_robin = qos(held_out, lambda observations, step: np.full(16, step % env.num_experts))
    print(f"QoS per request: DQN after {steps:,} steps {trained:.4f}, Round-Robin {round_robin:.4f}")


if __name__ == "__main__":
    main()
