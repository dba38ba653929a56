"""What the Markdown says exists: links, commands, names; and the quickstart runs.

README.md's own block of Python is run from the wheel (`tests/package.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxroute.routers import ROUTERS
from tests.compiling import compile_fast

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "examples", "benchmarks") for page in (ROOT / folder).rglob("*.md")),
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
NAME = re.compile(r"(?:`|python -m )((?:jaxroute|benchmarks)(?:\.[A-Za-z_]\w*)+)(?!\w*[./]\w*\.md)")
MAKE = re.compile(r"`make ([\w-]+)")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, attributes = name, []
    while not is_module(module):
        module, _, attribute = module.rpartition(".")
        attributes.insert(0, attribute)
    value = importlib.import_module(module) if attributes else None
    for attribute in attributes:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path):
    text = page.read_text()
    links = LINK.findall(text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:jaxroute|benchmarks|configs|docs|examples|tests)/[\w/.*-]+)`", text)
    assert [path for path in paths if not any(ROOT.glob(path))] == []
    names = NAME.findall(text)
    assert [name for name in names if not exists(name)] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in MAKE.findall(text) if target not in targets] == []
    for block in python_blocks(page):
        compile(block, str(page), "exec")


def test_pages_name_something():
    text = "\n".join(page.read_text() for page in PAGES)
    for pattern in (LINK, NAME, MAKE):
        assert len(pattern.findall(text)) > 5, pattern
    assert not exists("jaxroute.nothing") and not exists("jaxroute.testing.nothing") and exists("jaxroute.make")


@pytest.mark.slow
def test_the_quickstart_runs():
    program = "\n".join(python_blocks(ROOT / "docs" / "quickstart.md"))
    run = subprocess.run([sys.executable, "-c", program], env=compile_fast(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"balanced +QoS 0\.6", run.stdout), run.stdout


def test_the_map_of_modules_is_that_of_the_package():
    """Every module stands in the map of docs/architecture.md, but for each `__init__.py` that only has a docstring."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    folder, named = "", []
    for row in re.findall(r"^\|(.*?)\|", text.split("## Map")[1].split("## ")[0], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            folder = name if name.endswith("/") else folder
            named += [] if name.endswith("/") else [folder + name]
    paths = (ROOT / "jaxroute").rglob("*.py")
    modules = [path for path in paths if path.name != "__init__.py" or "import" in path.read_text()]
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in modules)


def test_the_layers_are_those_of_the_contract():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = text.split("## Layers")[1].split("```")[1].strip().splitlines()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert [re.split(r" {2,}", line)[0] for line in drawn] == contracts[0]["layers"]


def test_the_table_of_routers_has_a_row_for_each():
    table = (ROOT / "docs" / "routers.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [name for name in ROUTERS if "+" not in name]


def test_readme_has_the_one_block_that_is_run_from_the_wheel():
    assert len(python_blocks(ROOT / "README.md")) == 1
