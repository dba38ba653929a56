"""`python -m jaxroute.sweep`: the same as `jaxroute sweep`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("sweep"))
