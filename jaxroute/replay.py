"""`python -m jaxroute.replay`: the same as `jaxroute replay`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("replay"))
