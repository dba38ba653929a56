"""JAX's persistent compilation cache, so that commands compile a program only once."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR overrides the folder. Without a writable folder there is no cache.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxroute"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
