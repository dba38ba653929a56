"""`python -m jaxroute.calibrate`: the same as `jaxroute calibrate`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("calibrate")
