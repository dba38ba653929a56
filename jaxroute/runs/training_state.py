"""Stores the whole state of a training, including replay buffer and random keys; a resumed run is bit-identical.

orbax's `CheckpointManager` would need more code: its callback comes before a state has its name and does not identify
the state, so checksums need a separate handler; and it refuses to overwrite a damaged state.
"""

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.errors import UserError
from jaxroute.runs.checkpoint import DamagedError, checksums, load_arrays, save_arrays

FOLDER = "training_state"
REMEDY = "remove it to start from the beginning"


class TrainingStates(ExitStack):
    """Saves states of a training under `run`, periodically and in the background, and keeps the newest ones.

    Use it as a context manager; it ends when the last state has been written.
    """

    def __init__(self, run: Path, seconds: float, kept: int):
        """`seconds` is the time between two states, `kept` the number of states that are kept."""
        super().__init__()
        self._folder, self._seconds, self._kept = run / FOLDER, seconds, kept
        self._saved = time.monotonic()
        self._writer = self.enter_context(ThreadPoolExecutor(max_workers=1))
        self._writing: Future[None] | None = None

    def offer(self, frames: int, state: Any) -> None:
        """Starts saving `state`, a pytree of arrays after `frames` frames, if it is due and no other state is being
        written. `state` may be donated afterwards."""
        due = time.monotonic() - self._saved >= self._seconds
        if due and (self._writing is None or self._writing.done()):
            self._begin(frames, state)

    def save(self, frames: int, state: Any) -> None:
        """Saves `state` now, and returns when it is on disk. Raises `UserError` if it cannot be written."""
        self.wait()
        self._begin(frames, state)
        self.wait()

    def wait(self) -> None:
        """Waits until no state is being written. Raises `UserError` if one could not be written."""
        if self._writing is not None:
            self._writing.result()

    def _begin(self, frames: int, state: Any) -> None:
        self.wait()
        self._saved = time.monotonic()
        self._writing = self._writer.submit(self._write, frames, named_arrays(state))

    def _write(self, frames: int, arrays: dict[str, np.ndarray]) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            save_arrays(self._folder / f"frames-{frames:012d}", arrays)
            states = {path.with_suffix("") for path in self._folder.glob("frames-*")}
            for old in states.difference(_complete(self._folder)[-self._kept :]):  # and the remains of killed processes
                checksums(old).unlink(missing_ok=True)
                for path in self._folder.glob(f"{old.name}*"):
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError) as error:  # TensorStore raises ValueError
            raise UserError(f"{self._folder}: cannot be written ({error}); free space there, then --resume") from None


def newest_state(run: Path, example: Any) -> tuple[int, Any, list[str]]:
    """(frames, state, notes) of the newest complete state of a run; (0, None, []) if none was ever saved.

    `example` has the structure, shapes and dtypes of the state (`jax.eval_shape`). Notes name damaged states that were
    skipped, one line each.

    Raises:
        UserError: no state is complete, or the states are those of another training.
    """
    folder, notes = run / FOLDER, []
    for path in reversed(_complete(folder)):
        try:
            return int(path.name.partition("-")[2]), load_state(path, example, REMEDY), notes
        except DamagedError as error:
            notes.append(str(error))
    if notes:
        raise UserError(notes[0].replace(REMEDY, f"no state before it is left; remove {folder} to start anew"))
    return 0, None, []


def named_arrays(state: Any) -> dict[str, np.ndarray]:
    """Copies of the arrays of a pytree by their paths, for `save_arrays`; random keys are converted to their data.

    They are copies because on a CPU, NumPy views would share memory that JAX reuses when the state is donated.
    """
    return {name: np.array(leaf) for name, leaf in _named_leaves(_without_keys(state)).items()}


def load_state(folder: Path, example: Any, remedy: str) -> Any:
    """A pytree like `example` from its `named_arrays` in `folder`. Raises the errors of `load_arrays`."""
    arrays = load_arrays(folder, _named_leaves(jax.eval_shape(_without_keys, example)), remedy)
    leaves = [_like(arrays[name], leaf) for name, leaf in _named_leaves(example).items()]
    return jax.tree.unflatten(jax.tree.structure(example), leaves)


def remove_states(run: Path) -> None:
    """Removes all saved states of a run, if there are any."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """States with checksums, oldest first. A state without was being written or removed when the run was killed."""
    return sorted(path.with_suffix("") for path in folder.glob("frames-*.sha256"))


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _like(array: np.ndarray, leaf: Any) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(leaf) else jnp.asarray(array)
