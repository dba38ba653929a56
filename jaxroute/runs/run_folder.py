"""The folder of a run: where it may be, and what its numbers depend on."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

from jaxroute.errors import UserError

PACKAGES = ("jaxroute", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jraph", "chex", "numpy")


def prepare_run_folder(path: Path) -> None:
    """Makes the folder `path`. Raises `UserError` where it cannot be written or already holds something."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another folder") from None
    if occupied:
        raise UserError(f"--out {path}: is not empty; name a new folder, or empty this one")


def versions() -> dict[str, str]:
    """What the numbers of a run depend on beside its configuration."""
    packages = {package: version(package) for package in PACKAGES}
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
    }
    return {**packages, **machine}
