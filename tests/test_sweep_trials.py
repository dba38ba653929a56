"""`train_trials`: given settings as one sweep, from within a program."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

import jaxroute
from tests.compiling import compile_fast
from tests.sweeping import SPEC

OVERRIDES = [f"{key}={json.dumps(value)}" for key, value in SPEC["fixed"].items()]
PROGRAM = """
import json, sys
from pathlib import Path
import jaxroute

config = jaxroute.load_config(overrides=sys.argv[2:])
settings = [{"agent.critic_learning_rate": rate} for rate in (1e-3, 1e38, 1e-4)]
print(json.dumps([jaxroute.train_trials(config, settings, Path(sys.argv[1]), seeds=(0, 5)) for _ in range(2)]))
"""


@pytest.mark.slow
def test_each_setting_has_the_mean_over_its_seeds_in_the_table(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "sweep"), *OVERRIDES]
    run = subprocess.run(command, env=compile_fast(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, again = json.loads(run.stdout.splitlines()[-1])
    with (tmp_path / "sweep" / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert first == again and len(rows) == 6  # the second call finds all of it done
    for trial, qos in enumerate(first):
        own = [row["qos"] for row in rows if row["trial"] == str(trial)]
        assert qos == (None if trial == 1 else pytest.approx(sum(map(float, own)) / 2)), trial
    assert first[0] != first[2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"agent.gama": 0.9}, "trial 1: unknown key agent.gama; nearest: agent.gamma"),
        ({"agent.gamma": 2.0}, "trial 1: agent.gamma: expected a number above 0, at most 1, got 2.0"),
        ({"training.seed": 3}, "trial 1: training.seed is not varied in a sweep"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(tmp_path, setting, message):
    with pytest.raises(jaxroute.UserError, match=message):
        jaxroute.train_trials(jaxroute.load_config(), [{"agent.gamma": 0.9}, setting], tmp_path)
