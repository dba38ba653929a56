"""The console script `jaxroute`, and `python -m jaxroute`: runs a command, or lists commands and environments."""

import argparse
import sys
from collections.abc import Sequence

import jaxroute
from jaxroute.commands import COMMANDS, run
from jaxroute.errors import command, require_known


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name, or prints the list without one. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        return run(require_known(arguments[0], COMMANDS, "command"), arguments[1:])
    parser = argparse.ArgumentParser(
        prog="jaxroute",
        usage="jaxroute [-h] [--version] [COMMAND ...]",
        description="Lists the commands and the environments.",
        epilog="Options of a command: jaxroute COMMAND --help. python -m jaxroute.COMMAND is the same.",
    )
    parser.add_argument("--version", action="version", version=jaxroute.__version__)
    parser.parse_args(arguments)
    print(listing())
    return 0


def listing() -> str:
    """Commands and environments, one line each."""
    width = max(map(len, [*jaxroute.environments(), *COMMANDS])) + 2
    commands = [f"  {name:<{width}}{line}" for name, line in COMMANDS.items()]
    environments = [f"  {name:<{width}}{line}" for name, line in jaxroute.environments().items()]
    return "\n".join(
        [
            f"jaxroute {jaxroute.__version__}, dynamics {jaxroute.DYNAMICS_VERSION}",
            "",
            "Commands: jaxroute NAME --help",
            *commands,
            "",
            'Environments: jaxroute.make("NAME"), or jaxroute train environment.id=NAME',
            *environments,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
