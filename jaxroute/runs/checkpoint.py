"""Stores arrays of a run on disk: a folder in orbax's array format, with checksums of its files beside it."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.files import write_text

FOLDER = "checkpoint"


class DamagedError(UserError):
    """Stored arrays were damaged."""


def save_checkpoint(run: Path, params: Any) -> None:
    """Writes the network's parameters into the folder `run`, replacing previous ones."""
    save_arrays(run / FOLDER, params)


def load_checkpoint(run: Path, example: Any) -> Any:
    """Parameters with the structure, shapes and dtypes of `example`.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it is that of another network.
    """
    folder = run / FOLDER
    if not checksums(folder).is_file():
        raise UserError(f"{checksums(folder)}: missing or unreadable; {run} holds no finished training run")
    return load_arrays(folder, example, "copy the run again or train anew")


def save_arrays(folder: Path, tree: Any) -> None:
    """Writes `tree`, dicts of arrays, as `folder`, replacing it. The checksums are last, and make it valid."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every step
    checksums(folder).unlink(missing_ok=True)
    for unfinished in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished)
    # Without compression, it takes half the time and a sixth more space.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        # NumPy arrays have no device, so parameters trained on a GPU can be loaded anywhere.
        checkpointer.save(folder.absolute(), jax.device_get(tree), force=True)
    write_text(checksums(folder), "".join(f"{digest}  {name}\n" for name, digest in sorted(_digests(folder).items())))


def load_arrays(folder: Path, example: Any, remedy: str) -> Any:
    """The arrays that `save_arrays` wrote, as NumPy arrays with the structure, shapes and dtypes of `example`.

    Checksums are compared first, since orbax prints pages of text for damaged arrays. It reads only arrays and JSON,
    and executes no code from them.

    Raises:
        DamagedError: a file is incomplete, changed or unreadable; the message ends with `remedy`.
        UserError: the arrays have other shapes.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        lines = checksums(folder).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = _digests(folder)
    except (OSError, UnicodeDecodeError):
        raise DamagedError(f"{folder}: checksums are missing or unreadable; {remedy}") from None
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if damaged or not expected:
        what = damaged[0] if damaged else checksums(folder).name
        raise DamagedError(f"{folder}: {what} is cut short, missing or altered; {remedy}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(folder.absolute())
    # Shapes are compared here: orbax would return the stored shapes, or fail with pages of text.
    shapes, wanted = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (arrays, example))
    if shapes != wanted:
        raise UserError(f"{folder}: is of another configuration than config.yaml; restore that file or train anew")
    return arrays


def checksums(folder: Path) -> Path:
    """The file beside `folder` with the SHA-256 of each file in it."""
    return folder.with_name(f"{folder.name}.sha256")


def _digests(folder: Path) -> dict[str, str]:
    """Path relative to `folder` -> SHA-256 of each file in it."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def load_params(run: Path, network: nn.Module, env: RoutingEnvironment, env_params: EnvParams) -> Any:
    """The variables of `network` from the checkpoint in `run`. Raises the errors of `load_checkpoint`."""
    observation, _ = jax.eval_shape(env.reset, jax.random.key(0), env_params)
    return load_checkpoint(run, jax.eval_shape(network.init, jax.random.key(0), observation))
