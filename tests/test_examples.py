"""The examples that need no further package: their short forms run, and the index has every file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import compile_fast

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUTERS = {
    "heuristic": ["heuristic", "round_robin"],
    "planning": ["planning", "round_robin"],
    "ppo": ["ppo", "round_robin"],
    "domain_randomisation": ["randomised", "one cluster", "round_robin"],
    "own_reward": ["own reward", "usual reward", "round_robin"],
    "own_network": ["own network", "round_robin"],
}
"""What each of them compares."""
NAMES = tuple(ROUTERS)
FIGURE = re.compile(r"(?:^|[:,] )(\w[\w ]*?) +(?:QoS - cost \S+ +)?(?:QoS )?(0\.\d{4})", re.MULTILINE)
COSTS = re.compile(r"^(\w[\w ]*?) +QoS - cost (\S+) .* cost (\S+)$", re.MULTILINE)

# One process for all, so that they share what is compiled: the training of PPO, and evaluations of equal shapes.
PROGRAM = """
import importlib, sys

for name in sys.argv[1:]:
    print(f"# {name}")
    importlib.import_module(name).main(["--short"])
"""


@pytest.mark.slow
def test_short_forms_run():
    command = [sys.executable, "-c", PROGRAM, *NAMES]
    run = subprocess.run(command, env=compile_fast(EXAMPLES), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = dict(part.split("\n", 1) for part in run.stdout.split("# ")[1:])
    assert tuple(printed) == NAMES
    qos = {name: {router: float(value) for router, value in FIGURE.findall(text)} for name, text in printed.items()}
    assert {name: list(routers) for name, routers in qos.items()} == ROUTERS
    for name, routers in qos.items():
        assert all(0 < value < 1 for value in routers.values()), name
    # The same requests for Round-Robin wherever episodes are as many and as long.
    assert qos["heuristic"]["round_robin"] == qos["own_network"]["round_robin"] != qos["heuristic"]["heuristic"]
    assert qos["ppo"]["round_robin"] == qos["own_reward"]["round_robin"]
    costs = {router: [float(value) for value in values] for router, *values in COSTS.findall(printed["own_reward"])}
    assert list(costs) == ROUTERS["own_reward"]
    for router, (less, cost) in costs.items():
        assert less == pytest.approx(qos["own_reward"][router] - cost, abs=2e-4) and cost > 0, router


def test_the_index_has_every_example():
    index = (EXAMPLES / "README.md").read_text()
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert files and [name for name in files if f"({name})" not in index] == []
