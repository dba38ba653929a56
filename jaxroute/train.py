"""`python -m jaxroute.train`: trains a router, evaluates it against the heuristics, and keeps it all in a folder."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxroute.compilation_cache import keep_compiled_programs
from jaxroute.config.build import Experiment, build
from jaxroute.config.loader import config_text, load_config
from jaxroute.config.schema import Config
from jaxroute.environment.metrics import summarize
from jaxroute.environment.routers import make_router
from jaxroute.errors import UserError, command
from jaxroute.evaluate import compare
from jaxroute.learner.trainer import make_trainer
from jaxroute.report.checkpoint import save_checkpoint
from jaxroute.report.files import write_text
from jaxroute.report.pictures import learning_curve, qos_comparison
from jaxroute.report.progress import TrainingProgress
from jaxroute.report.run_folder import MetricsLog, prepare_run_folder, versions
from jaxroute.report.tables import print_evaluation, print_notes, report_console, write_evaluation


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxroute.train",
        description="Train a router and evaluate it against Round-Robin, Shortest Queue First, BERT Router and random.",
        epilog="Example: python -m jaxroute.train workload.arrivals.rate=4 agent.gamma=0.95 --seed 1",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: configs/default.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the training, the same as training.seed=SEED")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the run (default: runs/CONFIG-TIME)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change of the configuration, key as in a.b")
    arguments = parser.parse_intermixed_args(argv)

    seed = [] if arguments.seed is None else [f"training.seed={arguments.seed}"]
    config = load_config(arguments.config, [*arguments.overrides, *seed])
    experiment = build(config)
    name = arguments.config.stem if arguments.config else "default"
    run = arguments.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    prepare_run_folder(run)

    console = report_console()
    print_notes(console, experiment.notes)
    write_text(run / "config.yaml", config_text(config))
    write_text(run / "versions.json", json.dumps({"seed": config.training.seed, **versions()}, indent=2) + "\n")
    console.print(f"training on {jax.devices()[0].device_kind}, run in {run}", highlight=False)

    started = time.monotonic()
    params, records = train(config, experiment, run, console)
    trained = time.monotonic()
    save_checkpoint(run, params)
    results = compare(config, experiment, params, console)
    write_evaluation(run / "evaluation.json", results, config.evaluation.seed, experiment.notes)
    learning_curve(run / "learning_curve.png", records, results)
    qos_comparison(run / "qos.png", results)
    print_evaluation(console, results)
    seconds = f"training {trained - started:.0f} s, evaluation {time.monotonic() - trained:.0f} s"
    console.print(f"{seconds}; tables, pictures and checkpoint in {run}", highlight=False)
    return 0


def train(config: Config, experiment: Experiment, run: Path, console: Console) -> tuple[Any, list[dict[str, Any]]]:
    """Trains for `training.frames` frames, rounded up to whole chunks; returns the parameters and the logged metrics.

    Raises:
        UserError: training diverged.
        KeyboardInterrupt: as the user wished; once a chunk is done, its parameters are saved in `run` before.
    """
    env, env_params, hyper, sac = experiment.env, experiment.training_params, experiment.hyperparameters, experiment.sac
    name = config.training.warm_start
    warm_start = None if name is None else make_router(name, env)
    trainer = make_trainer(env, experiment.network, sac, experiment.params_axes, warm_start)
    per_chunk = sac.num_envs * sac.steps_per_chunk
    chunks = -(-config.training.frames // per_chunk)
    summary = jax.jit(partial(summarize, level=env.metrics))
    state = trainer.init(jax.random.key(config.training.seed), env_params, hyper)
    params, records = None, []
    started = time.monotonic()
    try:
        with MetricsLog(run) as log, TrainingProgress(console, chunks * per_chunk) as progress:
            for chunk in range(1, chunks + 1):
                state, metrics = trainer.train_chunk(state, env_params, hyper)
                # The parameters too, since the next chunk takes the state's memory over.
                metrics, params = jax.device_get((metrics, state.learner.params))
                totals = metrics.pop("episode")
                record: dict[str, Any] = {"frames": chunk * per_chunk, "seconds": round(time.monotonic() - started, 3)}
                record.update((name, float(value)) for name, value in metrics.items())
                if record["episodes"]:
                    episode = jax.device_get(summary(totals))
                    record["episode"] = {name: np.asarray(value).tolist() for name, value in episode.items()}
                records.append(log.write(record))
                progress.update(chunk * per_chunk, record)
                if state.learner.updates > 0 and not np.isfinite(record["mean_q"] + record["critic_loss"]):
                    frames = chunk * per_chunk
                    raise UserError(f"training diverged before frame {frames}; lower agent.critic_learning_rate")
    except KeyboardInterrupt:
        if not records:
            raise
        save_checkpoint(run, params)
        done = f"interrupted after frame {records[-1]['frames']}"
        raise KeyboardInterrupt(f"{done}; evaluate what is learned so far: python -m jaxroute.evaluate {run}") from None
    return params, records


if __name__ == "__main__":
    keep_compiled_programs()
    sys.exit(main())
