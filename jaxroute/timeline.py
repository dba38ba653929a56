"""`python -m jaxroute.timeline`: the same as `jaxroute timeline`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("timeline")
