"""A small sweep for the tests."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.compiling import ROOT, compile_fast

SPEC = {
    "fixed": {
        "training.frames": 600,
        "training.num_envs": 4,
        "training.buffer_capacity": 400,
        "training.batch_size": 16,
        "training.steps_per_chunk": 25,
        "training.checkpoint_seconds": 0,
        "agent.warmup_frames": 100,
        "environment.episode_length": 30,
        "environment.slots": 8,
        "environment.penalty": "off",
        "network.kind": "flat",
        "network.mlp": [8],
        "evaluation.episodes": 3,
    },
    "parameters": {
        "agent.critic_learning_rate": {"grid": [1e-3, 1e38, 1e-4]},  # the second diverges
        "workload.arrivals.rate": {"grid": [3.0, 6.0]},
    },
    "seeds": [0, 5],
    "rungs": [300],
    "keep": 0.5,
}
TIMES = {"seconds"}  # columns that differ from run to run


def write_spec(path: Path, **changes: Any) -> Path:
    """A file of the spec above with other sections; None leaves one out."""
    spec = {key: value for key, value in {**copy.deepcopy(SPEC), **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def start_sweep(folder: Path, cache: Path, *arguments: str, meeting: tuple[str, ...] = ()) -> subprocess.Popen:
    """The command in a process of its own, with its output in a file beside `folder`.

    `meeting`: a point of `tests.killing` and the signal that it sends itself there.
    """
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    program = ["tests.killing", *meeting, "sweep"] if meeting else ["jaxroute.sweep"]
    command = [sys.executable, "-m", *program, *arguments, "--out", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=compile_fast() | settings, stdout=log, stderr=subprocess.STDOUT)


def finished_sweep(folder: Path, cache: Path, spec: Path) -> Path:
    """`folder`, once a sweep of batches of three has ended there undisturbed."""
    process = start_sweep(folder, cache, str(spec), "--trials-per-batch", "3")
    assert process.wait() == 0, folder.with_suffix(".log").read_text()
    return folder


def parts(folder: Path) -> dict[str, Any]:
    """The results of each batch that is finished, without times."""
    found = {path.name: json.loads(path.read_text()) for path in (folder / "parts").glob("*.json")}
    for part in found.values():
        for row in part["rows"]:
            for name in TIMES:
                del row[name]
    return found


def table(folder: Path) -> list[dict[str, str]]:
    """`results.csv` without times."""
    with (folder / "results.csv").open(encoding="utf-8") as lines:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(lines)]
