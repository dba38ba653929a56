"""`python -m jaxroute.timeline`: the same as `jaxroute timeline`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("timeline"))
