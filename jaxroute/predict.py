"""`python -m jaxroute.predict`: the same as `jaxroute predict`."""

import sys

from jaxroute.commands import run

if __name__ == "__main__":
    sys.exit(run("predict"))
