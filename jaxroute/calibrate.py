"""`python -m jaxroute.calibrate`: the same as `jaxroute calibrate`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("calibrate"))
