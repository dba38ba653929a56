"""Each numbered rule of prefix caching and asynchronous scheduling is held: a mistake in any of them is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxroute.simulator import replay
from tests.fuzz import sharing_differences
from tests.planted import IN_JAX, IN_REPLAY, Mistake
from tests.reference.cases import sharing_case

FOLDER = Path(__file__).parent / "data" / "vllm_schedules" / "v033"
LARGEST = 70_000  # bytes of a recording that is compared here


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [sharing_case(rng) for _ in range(80)]


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in FOLDER.glob("*.json") if path.stat().st_size < LARGEST]


def is_noticed(cases: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> bool:
    """Whether the results of `replay` differ from the reference, or from what vLLM did; a crash is noticed too."""
    try:
        if any(sharing_differences([case]) for case in cases):
            return True
        with jax.enable_x64(True):
            return any(replay.replay(spec)["summary"].items() - spec["summary"].items() for spec in recorded)
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError):
        return True


@pytest.mark.parametrize("mistake", IN_REPLAY, ids=lambda mistake: mistake.rule)
def test_a_mistake_in_a_rule_is_noticed(mistake: Mistake, cases, recorded, monkeypatch):
    module = ModuleType("planted")
    exec(compile(mistake.planted(), mistake.file, "exec"), module.__dict__)
    monkeypatch.setattr(replay, "run_block_engine", module.run_block_engine)
    assert is_noticed(cases, recorded)


def test_without_a_mistake_nothing_is(cases, recorded):
    assert not is_noticed(cases, recorded)


def test_the_mistakes_of_the_engines_in_jax_can_be_planted():
    """`python -m tests.planted` runs them."""
    for mistake in IN_JAX:
        compile(mistake.planted(), mistake.file, "exec")
