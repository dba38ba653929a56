"""`python -m jaxroute.evaluate`: the same as `jaxroute evaluate`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
