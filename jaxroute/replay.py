"""`python -m jaxroute.replay`: the same as `jaxroute replay`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("replay")
