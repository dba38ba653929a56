"""The devices that a command uses."""

import os
from contextlib import suppress

import jax


def use_all_cores() -> None:
    """Makes each CPU core a JAX device, unless the user chose another number. Call it before JAX is first used.

    One program on one device uses little more than one core.
    """
    if jax.config.values["jax_num_cpu_devices"] == -1 and hasattr(os, "sched_getaffinity"):
        with suppress(RuntimeError):  # JAX has been used already
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
