"""Jobs: a training, or an evaluation at one point of a question. Results are stored, and jobs are not repeated."""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks.paper.plan import Setting, Training
from jaxroute.agent.trainer import policy_router
from jaxroute.commands.train import train
from jaxroute.config.build import Experiment, build_experiment
from jaxroute.config.loader import config_text, load_config, load_saved_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.tuning import tune_routers
from jaxroute.files import write_text
from jaxroute.routers import make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params, save_checkpoint
from jaxroute.runs.compilation_cache import keep_compiled_programs

EVALUATION_SEED = 1_000_000

METRICS = (
    "qos",
    "latency_per_token",
    "latency_per_token_p95",
    "violation_rate",
    "drop_rate",
    "rejection_rate",
    "utilization",
    "kv_use",
    "qos_per_busy_second",
)
"""The metrics of `metrics.summarize` that are stored."""


def start_worker(core: int | None) -> None:
    """Sets up a worker process before JAX is used there: if given, on one core, so that workers do not disturb each
    other."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    keep_compiled_programs()


def run_training(out: Path, job: Training, prepared: dict[str, str]) -> str:
    """Trains, unless the folder `out/training/...` has the same training; returns a line on the result."""
    folder = out / "training" / job.folder
    config = load_config(None, [*(part.format(**prepared) for part in job.overrides), f"training.seed={job.seed}"])
    wanted = config_text(config)
    if (folder / "checkpoint.sha256").is_file() and (folder / "config.yaml").read_text(encoding="utf-8") == wanted:
        return "kept"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", wanted)
    started = time.monotonic()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        params, records = train(config, build_experiment(config), folder, Console(file=log))
    save_checkpoint(folder, params)
    seconds = time.monotonic() - started
    _forget_programs()
    write_text(folder / "seconds.json", json.dumps({"seconds": round(seconds, 1)}))
    return f"{seconds:.0f} s, last QoS in training {records[-1]['qos']:.3f}"


def run_evaluation(out: Path, job: Setting, prepared: dict[str, str]) -> str:
    """Evaluates all routers of a setting on the same requests, unless `out/evaluations/NAME.json` exists."""
    path = out / "evaluations" / f"{job.name}.json"
    overrides = [part.format(**prepared) for part in job.overrides]
    runs = {label: [training.folder for training in trainings] for label, trainings in job.policies}
    checksums = {folder: _checksum(out, folder) for folders in runs.values() for folder in folders}
    spec = {
        "overrides": overrides,
        "routers": list(job.routers),
        "policies": runs,
        "checksums": checksums,
        "episodes": job.episodes,
        "episode_length": job.episode_length,
        "seed": EVALUATION_SEED,
    }
    if path.is_file() and (old := json.loads(path.read_text(encoding="utf-8")))["spec"] == spec:
        return _summary(old["values"])
    started = time.monotonic()
    if _question.get("now") != job.question:
        _forget_programs()
        _question["now"] = job.question
    experiment = _experiment(tuple(overrides), job.episode_length)
    routers: dict[str, Router] = {}
    for name, tuning in tune_routers(experiment.env, experiment.params, job.routers).items():
        numbers = jax.tree.map(np.asarray, tuning.parameters)
        routers[name] = jax.tree_util.Partial(_route(name, experiment.env), numbers)
    evaluate = partial(evaluate_routers, experiment.env, experiment.params, episodes=job.episodes, seed=EVALUATION_SEED)
    values = evaluate(routers)
    for label, folders in runs.items():
        for seed, folder in enumerate(folders):
            # One at a time: policies of one network then share a program for all seeds and settings.
            values |= evaluate({f"{label}/{seed}": _policy(out, folder, checksums[folder])})
    kept: dict[str, list[dict[str, list[float]]]] = {}
    for name, metrics in values.items():
        row = {metric: np.asarray(metrics[metric], float).tolist() for metric in METRICS}
        kept.setdefault(name.partition("/")[0], []).append(row)
    record = {"spec": spec, "values": kept, "seconds": round(time.monotonic() - started, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record) + "\n")
    return f"{record['seconds']:.0f} s, {_summary(kept)}"


def read_evaluation(out: Path, job: Setting) -> dict[str, list[dict[str, list[float]]]]:
    """Label -> for each seed (one for heuristics) metric -> values of the episodes."""
    return json.loads((out / "evaluations" / f"{job.name}.json").read_text(encoding="utf-8"))["values"]


def _summary(values: dict[str, list[dict[str, list[float]]]]) -> str:
    means = {label: float(np.mean([row["qos"] for row in rows])) for label, rows in values.items()}
    shown = [label for label in ("trained", "lookahead", "shortest_queue") if label in means]
    return "QoS " + ", ".join(f"{label} {means[label]:.4f}" for label in shown or list(means)[:1])


_question: dict[str, str] = {}
"""The question ("now") that this process evaluated last."""


def _forget_programs() -> None:
    """Frees compiled programs. Linux limits a process to 65,530 memory maps, which some dozens of programs use up.

    The programs remain in the compilation cache on disk.
    """
    for cached in (_experiment, _route, _policy):
        cached.cache_clear()
    jax.clear_caches()


@cache
def _experiment(overrides: tuple[str, ...], episode_length: int) -> Experiment:
    return build_experiment(load_config(None, [*overrides, f"environment.episode_length={episode_length}"]))


@cache
def _route(name: str, env: RoutingEnvironment) -> Any:
    """The router with its numbers as an argument: the same function at each call, so that a program compiles once."""

    def route(numbers: Any, *inputs: Any) -> jax.Array:
        return make_router(name, env, **numbers)(*inputs)

    return route


@cache
def _policy(out: Path, folder: str, checksum: str) -> Any:
    run = out / "training" / folder
    experiment = build_experiment(load_saved_config(run / "config.yaml"))
    network = experiment.network
    return policy_router(network, load_params(run, network, experiment.env, experiment.params))


def _checksum(out: Path, folder: str) -> str:
    return (out / "training" / folder / "checkpoint.sha256").read_text(encoding="utf-8")
