"""`python -m jaxroute.train`: the same as `jaxroute train`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("train")
