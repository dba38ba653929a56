"""The commands: `jaxroute NAME`, or `python -m jaxroute.NAME`. Each is a module with `main(argv) -> exit code`."""

import importlib
from collections.abc import Sequence

COMMANDS = {
    "train": "train a router and evaluate it",
    "sweep": "train with many settings and seeds at once",
    "suite": "train and evaluate on every environment of a suite",
    "evaluate": "evaluate a trained router and others on the same episodes",
    "calibrate": "estimate the engine of a real server from its request log",
    "predict": "train and apply predictors of output lengths and scores",
    "timeline": "draw one episode as a picture, a trace and a page",
    "serve": "route the requests of clients to real servers",
    "replay": "simulate one engine on a recorded list of requests",
}
"""Name -> one line on what the command does."""


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command with these arguments (default: those of the process), and returns its exit code.

    JAX's compiled programs are kept for the next run.
    """
    from jaxroute.runs.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    return importlib.import_module(f"jaxroute.commands.{name}").main(argv)
