"""The examples that need no further package: their short forms run, and the index has every file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import compile_fast

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("heuristic", "planning", "ppo", "domain_randomisation", "own_reward", "own_network")

# One process for all, so that they share what is compiled. An evaluation is one more compilation for each, so only the
# first has one; the routers of the others take one decision.
PROGRAM = """
import importlib, sys, jax, jaxroute, numpy as np

def one_decision(env, params, routers, episodes, seed):
    observation, state = jax.jit(env.reset)(jax.random.key(seed), params)
    actions = [int(jax.jit(router)(jax.random.key(seed), observation, state, params)) for router in routers.values()]
    assert all(0 <= action < env.num_actions for action in actions), actions
    return {name: {"qos": np.ones(1), "drop_rate": np.zeros(1), "expert_share": np.ones((1, 3))} for name in routers}

for name in sys.argv[1:]:
    print(name)
    example = importlib.import_module(name)
    if name != sys.argv[1]:
        jaxroute.evaluate_routers = one_decision
    example.main(["--short"])
"""


@pytest.mark.slow
def test_short_forms_run():
    command = [sys.executable, "-c", PROGRAM, *NAMES]
    run = subprocess.run(command, env=compile_fast(EXAMPLES), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name, part in zip(NAMES, run.stdout.split("round_robin")[:-1], strict=True):
        assert name in part


def test_the_index_has_every_example():
    index = (EXAMPLES / "README.md").read_text()
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert files and [name for name in files if f"({name})" not in index] == []
