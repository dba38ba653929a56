"""`python -m jaxroute.suite`: the same as `jaxroute suite`."""

import sys

from jaxroute.commands import run
from jaxroute.suites.description import suite

if __name__ == "__main__":
    sys.exit(run("suite"))
# The package's function of this name stays what it is when this module is imported.
sys.modules[__name__] = suite  # pyright: ignore[reportArgumentType]
