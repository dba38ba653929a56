"""The top level of the package: what it offers, what the examples and the documentation use of it, what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jaxroute
from tests.test_documentation import PAGES, python_blocks

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_and_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    for name in jaxroute.__all__:
        assert getattr(jaxroute, name) is not None and f" {name}\n" in reference, name
    assert dir(jaxroute) == sorted(jaxroute.__all__)
    assert not hasattr(jaxroute, "nothing")


def test_examples_and_documentation_use_public_names_alone():
    programs = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    programs += [block for page in PAGES for block in python_blocks(page)]
    used = {name for program in programs for name in re.findall(r"\bjaxroute\.(\w+)", program)}
    assert {"make", "evaluate_routers"} <= used
    assert used <= {*jaxroute.__all__, "adapters", "serving", "testing"}


def test_importing_the_package_imports_nothing_that_only_training_and_pictures_need():
    program = "import jaxroute, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "jaxroute" in loaded and not loaded & {"optax", "orbax", "matplotlib", "jraph", "tensorboardX"}
