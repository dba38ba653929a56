"""Optuna chooses the settings of a batch of trials at a time, and jaxroute trains each batch as one program.

    pip install 'jaxroute[optuna]'
    python examples/optuna_search.py

Each round asks the study for a batch of settings, trains all of them as one program, and tells the study their QoS.
The sampler (TPE) therefore sees the results of a whole batch at once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import optuna

import jaxroute

LONG = [
    "training.frames=60000",
    "training.buffer_capacity=9984",
    "agent.warmup_frames=4000",
    "evaluation.episodes=4",
]
SHORT = [
    "training.frames=400",
    "training.num_envs=4",
    "training.buffer_capacity=400",
    "training.batch_size=16",
    "network.kind=flat",
    "network.mlp=[8]",
    "environment.episode_length=30",
    "environment.penalty=off",
    "evaluation.episodes=2",
]


def suggest(trial: Any) -> dict[str, Any]:
    """Settings of one trial. All keys are traced, so every round is the same program."""
    return {
        "agent.critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-3, log=True),
        "agent.target_entropy_ratio": trial.suggest_float("target_entropy_ratio", 0.05, 0.7),
        "agent.gamma": trial.suggest_float("gamma", 0.85, 0.97),
    }


def main() -> None:
    jaxroute.keep_compiled_programs()  # each round is the same program
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few frames, to see that it runs")
    short = parser.parse_args().short
    rounds, batch = (2, 2) if short else (5, 8)
    config = jaxroute.load_config(overrides=SHORT if short else LONG)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
    with tempfile.TemporaryDirectory() as results:
        for number in range(rounds):
            asked = [study.ask() for _ in range(batch)]
            settings = [suggest(trial) for trial in asked]
            qos = jaxroute.train_trials(config, settings, Path(results) / f"round{number}")
            for trial, value in zip(asked, qos, strict=True):
                failed = optuna.trial.TrialState.FAIL if value is None else None  # its training diverged
                study.tell(trial, value, failed)
            print(f"round {number}: best QoS so far {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
