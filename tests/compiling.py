"""Programs that run for milliseconds, compiled in the fastest way that this JAX has."""

from __future__ import annotations

import os
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
FAST_FLAG, AS_USERS_GET = "", {}
if jax.__version_info__ < (0, 11):  # halves the time to compile; later ones do not know it, and stop at it
    FAST_FLAG, AS_USERS_GET = "--xla_cpu_use_fusion_emitters=false", {"xla_cpu_use_fusion_emitters": True}
"""A flag of XLA for a process; and options of a program there that is compiled as without the flag."""


def compile_fast(*paths: Path) -> dict[str, str]:
    """Variables of a process that imports from `paths` and from the checkout; it has this one's flags of XLA too."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
