"""The folder of a run, and the versions that its results depend on."""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

from jaxroute.errors import UserError, require_known
from jaxroute.routers import ROUTERS

PACKAGES = ("jaxroute", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jraph", "chex", "numpy")


def writable_folder(path: Path) -> list[Path]:
    """Creates the folder `path`, and returns what is in it. Raises `UserError` if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return list(path.iterdir())
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name another folder") from None


def prepare_run_folder(path: Path) -> None:
    """Creates the folder `path`. Raises `UserError` if it cannot be written or is not empty."""
    if writable_folder(path):
        raise UserError(f"--out {path}: is not empty; name a new folder, or empty this one")


def require_run_or_router(path: Path) -> None:
    """Raises `UserError` for what is no router's name and no folder of a run, although one of them was meant."""
    if (path / "config.yaml").is_file():
        return
    if path.exists() or len(path.parts) > 1:
        raise UserError(f"{path}: has no config.yaml; give a folder that jaxroute train wrote, or a router")
    require_known(str(path), ROUTERS, "router")


def versions() -> dict[str, str]:
    """Versions that the results of a run depend on, in addition to its configuration."""
    packages = {package: version(package) for package in PACKAGES}
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
    }
    return {**packages, **machine}
