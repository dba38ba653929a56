"""`python -m jaxroute.evaluate`: the same as `jaxroute evaluate`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("evaluate")
