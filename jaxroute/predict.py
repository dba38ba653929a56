"""`python -m jaxroute.predict`: the same as `jaxroute predict`."""

from jaxroute.commands import run

if __name__ == "__main__":
    run("predict")
