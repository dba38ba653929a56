"""What commands share that read requests from a file: their options, and the line that says what was read."""

import argparse
import sys
from collections.abc import Sequence

from jaxroute.workload.formats import UNITS
from jaxroute.workload.reading import Reading


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxroute.workload.trace.load_trace` that every command takes."""
    parser.add_argument("--time-unit", choices=tuple(UNITS), help="unit of the file's times, if not its format's")
    parser.add_argument("--run", type=int, metavar="N", help="which of several results in the file, from 1 on")


def print_readings(readings: Sequence[Reading]) -> None:
    """Prints a line for each file that was read, and what is unlikely on standard error."""
    for reading in readings:
        line, *unlikely = reading.lines()
        print(f"read {line}")
        for text in unlikely:
            print(text, file=sys.stderr)
