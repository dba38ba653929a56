"""The folder of a run: where it may be, and what is recorded there."""

from __future__ import annotations

import json
import math
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jaxroute.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jraph", "chex", "numpy")


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
    return {"jaxroute": _own_version(), **packages, **machine}


class MetricsLog:
    """`metrics.jsonl`, a line per chunk of training, and the same scalars as TensorBoard events. Use as a context."""

    def __init__(self, run: Path):
        self._lines = (run / "metrics.jsonl").open("w", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._events.close()

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Logs `record`: "frames" and metrics, one level of nesting. Returns what was logged, None in place of NaN."""
        record = _finite(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            for tag, scalar in _scalars(name, value):
                self._events.add_scalar(tag, scalar, record["frames"])
        return record


def _own_version() -> str:
    import jaxroute

    return jaxroute.__version__


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _scalars(f"{name}/{key}", item)]
    if isinstance(value, list):
        return [pair for index, item in enumerate(value) for pair in _scalars(f"{name}/{index}", item)]
    return [] if value is None else [(name, value)]
