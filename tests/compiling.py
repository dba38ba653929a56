"""Programs that run once, in a process of their own: compiled fast, with what `conftest` set for all tests."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compile_fast(*paths: Path) -> dict[str, str]:
    """Variables of a process that imports from `paths` and from the checkout."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
