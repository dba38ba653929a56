"""Fixtures of several files."""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure

from tests.compiling import AS_USERS_GET, FAST_FLAG

# A folder of compiled programs for each process of pytest and those that its tests start: what two of them run is
# compiled once, and the user's own folder is left alone. Workers of pytest-xdist have one each: JAX does not write a
# file at once, and another worker might read half of it. All go with the first process.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"
else:
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxroute-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Most programs of the tests run for milliseconds: they compile in half the time without optimisation, and with this
# flag in half of that. XLA reads its flags when the first program is compiled.
jax.config.update("jax_disable_most_optimizations", True)
if FAST_FLAG not in os.environ.get("XLA_FLAGS", ""):  # workers have it from the first process
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_FLAG}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no long one is left for a single worker at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module")
def optimised_programs() -> Iterator[None]:
    """For files that test programs as users get them, where these are made during a test."""
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_USERS_GET))
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def figures(monkeypatch) -> dict[str, Figure]:
    """The figures that are written during the test by the names of their files, in order."""
    found: dict[str, Figure] = {}
    save = Figure.savefig

    def save_and_keep(figure: Figure, path: Path, **options: Any) -> None:
        save(figure, path, **options)
        assert path.read_bytes().startswith(b"\x89PNG")
        found[path.name.removeprefix(".").removesuffix(".partial")] = figure

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return found
