"""`python -m jaxroute.sweep`: the same as `jaxroute sweep`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("sweep")
