"""Runs a batch of a sweep from one rung to the next, and continues where a killed process stopped."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxroute.runs.checkpoint import save_arrays
from jaxroute.runs.stopping import Stop
from jaxroute.runs.training_state import TrainingStates, load_state, named_arrays, newest_state
from jaxroute.sweeps.plan import Batch, Row
from jaxroute.sweeps.program import Program
from jaxroute.sweeps.results import make_part
from jaxroute.sweeps.spec import Spec

HISTORY = ("qos", "reward", "return", "entropy", "alpha", "mean_q", "critic_loss", "updates")
"""Names in the history of a batch: metrics of `Trainer` per chunk, and the total number of updates."""


class BatchState(NamedTuple):
    """The saved state of an unfinished batch."""

    states: Any
    history: dict[str, np.ndarray]  # each float32 [chunks of the rung, size], NaN for future chunks
    seconds: np.ndarray  # float32 [], seconds used up to now


def run_batch(
    spec: Spec, program: Program, batch: Batch, work: Path, stop: Stop, chunk_done: Callable[[float], None]
) -> dict[str, Any]:
    """Trains a batch to the end of its rung and evaluates it. Returns the part of the results (`results.make_part`).

    States are saved under `work`: that of the unfinished batch, and if another rung follows, the final state of each
    training. `chunk_done` is called with the share of finished chunks.

    Raises:
        Interrupted: a signal came; the states have been saved.
        UserError: the states of an earlier process cannot be used.
    """
    first = _chunks(spec.rungs[batch.rung - 1], program) if batch.rung else 0
    length = _chunks(spec.rungs[batch.rung], program) - first
    inputs = program.inputs(batch.rows)
    folder = work / batch.name
    folder.mkdir(exist_ok=True)
    history = {name: np.full((length, program.size), np.nan, np.float32) for name in HISTORY}
    done, unfinished, _ = newest_state(folder, BatchState(program.state_shapes, history, np.zeros((), np.float32)))
    if unfinished is None:
        states, spent = _first_states(program, batch, inputs, work), 0.0
    else:
        states, spent = program.restored(unfinished.states), float(unfinished.seconds)
        history = jax.tree.map(np.array, unfinished.history)
    started = time.monotonic()

    def seconds() -> np.ndarray:
        return np.array(spent + time.monotonic() - started, np.float32)

    checkpoint_seconds = spec.trials[batch.rows[0].trial].config.training.checkpoint_seconds
    with TrainingStates(folder, checkpoint_seconds, kept=1) as saved:
        for chunk in range(done, length):
            states, metrics = program.train_chunk(states, inputs)
            for name, value in {**metrics, "updates": states.learner.updates}.items():
                if name in history:
                    history[name][chunk] = value
            chunk_done((chunk + 1) / length)
            if stop:
                saved.save(chunk + 1, BatchState(states, history, seconds()))
                raise stop.interrupted(f"stopped in {batch.name}; the same command goes on")
            saved.offer(chunk + 1, BatchState(states, history, seconds()))
        saved.wait()
    evaluation = jax.device_get(program.evaluate(states, inputs))
    if batch.rung + 1 < len(spec.rungs):
        # To take a training out of arrays on several devices is an all-reduce for each of them, and on a busy machine
        # XLA's CPU devices may miss each other in one, and end the process.
        states = jax.device_get(states)
        for index, row in enumerate(batch.rows):
            save_arrays(_end(work, batch.rung, row), named_arrays(_one(program, states, index)))
    frames = [program.frames_per_chunk * (first + chunk + 1) for chunk in range(length)]
    return make_part(spec, batch, frames, history, evaluation, float(seconds()))


def forget_batch(batch: Batch, work: Path) -> None:
    """Removes the states of a batch whose results have been written."""
    shutil.rmtree(work / batch.name, ignore_errors=True)


def forget_rung(rung: int, work: Path) -> None:
    """Removes the states at the end of a rung, once the next one is done."""
    shutil.rmtree(work / f"rung{rung}-ends", ignore_errors=True)


def _chunks(frames: int, program: Program) -> int:
    return -(-frames // program.frames_per_chunk)


def _first_states(program: Program, batch: Batch, inputs: Any, work: Path) -> Any:
    if batch.rung == 0:
        return program.init(batch.rows, inputs)
    example = jax.eval_shape(lambda states: _one(program, states, 0), program.state_shapes)
    ends = [_end(work, batch.rung - 1, row) for row in program.filled(batch.rows)]
    remedy = "start the sweep in a new folder"
    trees = [load_state(end, example, remedy) for end in ends]

    def joined(axis: int | None, *parts: Any) -> Any:
        return parts[0] if axis is None else jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *parts)

    return program.restored(jax.tree.map(joined, program.state_axes, *trees, is_leaf=lambda axis: axis is None))


def _one(program: Program, states: Any, index: int) -> Any:
    """The state of one training of a batch."""

    def picked(axis: int | None, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[index], part)

    return jax.tree.map(picked, program.state_axes, states, is_leaf=lambda axis: axis is None)


def _end(work: Path, rung: int, row: Row) -> Path:
    return work / f"rung{rung}-ends" / f"trial{row.trial}-seed{row.seed}"
