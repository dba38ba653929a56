"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def cheap_programs() -> Iterator[None]:
    """For files whose programs run for milliseconds: they are compiled in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
