"""A run's checkpoint: the network's parameters in orbax's array format, and checksums of its files beside it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxroute.errors import UserError
from jaxroute.report.files import write_text

FOLDER, CHECKSUMS = "checkpoint", "checkpoint.sha256"


def save_checkpoint(run: Path, params: Any) -> None:
    """Writes `params` (pytree of arrays) under the folder `run`, their checksums last."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each of its steps
    folder = run.absolute() / FOLDER
    with ocp.StandardCheckpointer() as checkpointer:
        # As NumPy arrays, which name no device: what a GPU trained is evaluated anywhere.
        checkpointer.save(folder, jax.device_get(params))
    write_text(run / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(_checksums(folder).items())))


def load_checkpoint(run: Path, example: Any) -> Any:
    """Parameters with the structure, shapes and dtypes of `example`. Reads arrays and JSON, and runs nothing in them.

    Checksums are compared first, since orbax meets a damaged checkpoint with pages of text.

    Raises:
        UserError: no checkpoint, one that is cut short or altered, or one of another network.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder, checksums = run.absolute() / FOLDER, run / CHECKSUMS
    try:
        lines = checksums.read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = _checksums(folder)
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{checksums}: missing or unreadable; {run} holds no finished training run") from None
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if damaged or not expected:
        what = damaged[0] if damaged else CHECKSUMS
        raise UserError(f"{folder}: {what} is cut short, missing or altered; copy the run again or train anew")
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder)
    # Compared here: asked for other shapes, orbax returns the stored ones or fails noisily.
    shapes, wanted = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (params, example))
    if shapes != wanted:
        raise UserError(f"{folder}: holds another network than config.yaml describes; restore that file or train anew")
    return params


def _checksums(folder: Path) -> dict[str, str]:
    """Path relative to `folder` -> SHA-256 of each file in it."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
