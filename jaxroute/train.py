"""`python -m jaxroute.train`: the same as `jaxroute train`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("train"))
