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
        assert 0.4 < routers["round_robin"] < 0.8, name
    # Equal clusters and episodes are the same requests, and equal trainings the same policy.
    assert qos["heuristic"]["round_robin"] == qos["own_network"]["round_robin"] < qos["heuristic"]["heuristic"]
    assert len({qos[name]["round_robin"] for name in ("ppo", "own_reward", "domain_randomisation")}) == 1
    assert qos["ppo"]["ppo"] == qos["own_reward"]["usual reward"] == qos["domain_randomisation"]["one cluster"]
    costs = {router: (float(less), float(cost)) for router, less, cost in COSTS.findall(printed["own_reward"])}
    for router, value in qos["own_reward"].items():
        less, cost = costs[router]
        assert less == pytest.approx(value - cost, abs=2e-4), router
    assert costs["round_robin"][1] == 0.118  # of 50 requests 17, 17 and 16 at 0.25, 0.05 and 0.05


def test_the_index_has_every_example():
    index = (EXAMPLES / "README.md").read_text()
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert files and [name for name in files if f"({name})" not in index] == []
