"""What a command computes on."""

from __future__ import annotations

import os
from contextlib import suppress

import jax


def use_all_cores() -> None:
    """Makes each core a device where JAX computes on the CPU and nothing else was asked for; before JAX's first use.

    One program uses little more than one core.
    """
    if jax.config.values["jax_num_cpu_devices"] == -1 and hasattr(os, "sched_getaffinity"):
        with suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
