"""The commands: `jaxroute NAME`, or `python -m jaxroute.NAME`. Each is a module with `main(argv) -> exit code`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a router and evaluate it",
    "sweep": "many trainings at once, over settings and seeds",
    "evaluate": "a trained router and others on the same episodes",
    "calibrate": "the engine of a real server from its request log",
    "predict": "train and apply predictors of output lengths and scores",
    "timeline": "one episode as a picture, a trace and a page",
    "replay": "one engine on a recorded list of requests",
}
"""Name -> what it does, a line each."""


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command with these arguments (default: the process's own), and ends the process with its exit code.

    What JAX compiles is kept for the next run.
    """
    from jaxroute.runs.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    sys.exit(importlib.import_module(f"jaxroute.commands.{name}").main(argv))
