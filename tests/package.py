"""`python -m tests.package DIST`: the wheel and the source archive in DIST do what they must outside of the checkout.

The wheel is installed into an empty environment, without this one's packages, and runs README.md's first snippet. The
source archive has every file under version control but NOT_SHIPPED, and this environment's pytest collects its tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

PROBE = """
import importlib.util
from pathlib import Path

import jaxroute
from jaxroute.config.loader import config_folder, load_config

package = Path(jaxroute.__file__).parent
assert "site-packages" in package.parts, package
assert (package / "py.typed").is_file() and config_folder() == package / "configs"
assert load_config(config_folder() / "paper.yaml").environment.penalty == "paper"
assert not any(importlib.util.find_spec(name) for name in ("tests", "benchmarks", "configs", "pytest"))
"""

NOT_SHIPPED = {".ci/run", ".gitignore"}


def main(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (archive,) = dist.glob("*.tar.gz")
    snippet = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet, "README.md has no block of Python"
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        venv.create(away / "empty", with_pip=True)
        python = away / "empty" / "bin" / "python"
        # What is imported is compiled to bytecode then, instead of everything now.
        run(
            away,
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
            wheel.resolve(),
        )
        run(away, python, "-c", PROBE)
        run(away, python, "-c", snippet[1])
        run(away, python, "-m", "jaxroute")
        run(away, python, "-m", "jaxroute.train", "--help")
        with tarfile.open(archive) as sources:
            sources.extractall(away, filter="data")
        unpacked = away / archive.name.removesuffix(".tar.gz")
        tracked = set(run(Path(), "git", "ls-files").splitlines())
        left_out = sorted(name for name in tracked - NOT_SHIPPED if not (unpacked / name).is_file())
        assert not left_out, f"pyproject.toml leaves out of the source archive: {', '.join(left_out)}"
        run(unpacked, sys.executable, "-m", "pytest", "--collect-only", "-q")
    print(f"{wheel.name} and {archive.name} work outside of the checkout")


def run(folder: Path, *command: str | Path) -> str:
    """What the command prints, run in `folder`; ends this program with it where the command fails."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=outside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
