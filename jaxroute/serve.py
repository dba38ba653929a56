"""`python -m jaxroute.serve`: the same as `jaxroute serve`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("serve"))
