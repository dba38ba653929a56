"""JAX's persistent compilation cache, so that commands compile a program only once."""

import jax

from jaxroute.files import cache_folder


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR overrides the folder. Without a writable folder there is no cache.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = cache_folder()
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
