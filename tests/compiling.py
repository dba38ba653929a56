"""Programs that run once, in a process of their own: compiled in the fastest way that this JAX has."""

from __future__ import annotations

import os
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]


def compile_fast(*paths: Path) -> dict[str, str]:
    """Variables of a process that imports from `paths` and from the checkout."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ < (0, 11):  # halves the time to compile; later ones do not know it, and stop at it
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": flags,
    }
