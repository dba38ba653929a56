"""`python -m jaxroute`: the commands and the environments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jaxroute

COMMANDS = {
    "train": "train a router and evaluate it",
    "sweep": "many trainings at once, over settings and seeds",
    "evaluate": "a trained router and others on the same episodes",
    "calibrate": "the engine of a real server from its request log",
    "predict": "train and apply predictors of output lengths and scores",
    "timeline": "one episode as a picture, a trace and a page",
    "replay": "one engine on a recorded list of requests",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the list; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxroute",
        description="Lists the commands and the environments.",
        epilog="A command is a module: python -m jaxroute.train",
    )
    parser.add_argument("--version", action="version", version=jaxroute.__version__)
    parser.parse_args(argv)
    print(listing())
    return 0


def listing() -> str:
    """Commands and environments, a line each."""
    width = max(map(len, [*jaxroute.environments(), *COMMANDS])) + 2
    commands = [f"  {name:<{width}}{line}" for name, line in COMMANDS.items()]
    environments = [f"  {name:<{width}}{line}" for name, line in jaxroute.environments().items()]
    return "\n".join(
        [
            f"jaxroute {jaxroute.__version__}, dynamics {jaxroute.DYNAMICS_VERSION}",
            "",
            "Commands: python -m jaxroute.NAME --help",
            *commands,
            "",
            'Environments: jaxroute.make("NAME"), or python -m jaxroute.train environment.id=NAME',
            *environments,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
