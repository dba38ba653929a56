"""Optuna chooses the settings, jaxroute trains them: a batch of trials at a time, as one program.

    pip install 'jaxroute[optuna]'
    python examples/optuna_search.py

Each round asks the study for a batch, trains and evaluates it as a sweep of its own, and tells the study the QoS. The
sampler (TPE) is told a whole batch at once, which is what a program for a batch costs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import optuna

from jaxroute.config.loader import change_config, load_config
from jaxroute.console import report_console
from jaxroute.runs.compilation_cache import keep_compiled_programs
from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.driver import execute_here, run_missing_batches
from jaxroute.sweeps.plan import make_groups
from jaxroute.sweeps.ranking import ranking
from jaxroute.sweeps.results import SweepFolder
from jaxroute.sweeps.spec import Spec, Trial

LONG = {
    "training.frames": 60000,
    "training.buffer_capacity": 9984,
    "agent.warmup_frames": 4000,
    "evaluation.episodes": 4,
}
SHORT = {
    "training.frames": 400,
    "training.num_envs": 4,
    "training.buffer_capacity": 400,
    "training.batch_size": 16,
    "network.kind": "flat",
    "network.mlp": [8],
    "environment.episode_length": 30,
    "environment.penalty": "off",
    "evaluation.episodes": 2,
}


def suggest(trial: Any) -> dict[str, Any]:
    """Traced keys, so that every round is the same program."""
    return {
        "agent.critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-3, log=True),
        "agent.target_entropy_ratio": trial.suggest_float("target_entropy_ratio", 0.05, 0.7),
        "agent.gamma": trial.suggest_float("gamma", 0.85, 0.97),
    }


def main() -> None:
    keep_compiled_programs()  # each round is the same program
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few frames, to see that it runs")
    short = parser.parse_args().short
    rounds, batch = (2, 2) if short else (5, 8)
    base = change_config(load_config(), SHORT if short else LONG, "this example")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
    with tempfile.TemporaryDirectory() as results, Stop() as stop:
        for number in range(rounds):
            asked = [study.ask() for _ in range(batch)]
            values = [suggest(trial) for trial in asked]
            trials = tuple(Trial(i, each, change_config(base, each, "Optuna")) for i, each in enumerate(values))
            spec = Spec(trials, seeds=(0,), rungs=(base.training.frames,), keep=1.0, text=str(trials))
            groups, _ = make_groups(spec)
            folder = SweepFolder(Path(results) / f"round{number}", spec)
            sizes = {"devices": len(jax.local_devices()), "0": batch}
            run_missing_batches(
                spec, groups, folder, sizes, execute_here(spec, groups, sizes, folder, stop), report_console()
            )
            qos = {place.trial: place.qos for place in ranking(folder.rows())}
            for index, trial in enumerate(asked):
                if index in qos:
                    study.tell(trial, qos[index])
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)  # diverged
            print(f"round {number}: best QoS so far {study.best_value:.4f} with {study.best_params}")


if __name__ == "__main__":
    main()
