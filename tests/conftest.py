"""What holds for every test."""

from __future__ import annotations

import os
from importlib.metadata import version

# Compilation is most of the suite's time, and this halves it. Later versions do not know the flag, and stop at it; with
# them (CI's second half) programs are compiled as users' are.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
