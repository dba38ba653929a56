"""The console that commands print to, and notes on the data."""

from collections.abc import Sequence

from rich.console import Console


def report_console() -> Console:
    """Standard output; if it is a file or a pipe, with a width of 100 characters."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Prints a line for each note, as it is: without markup or highlighting."""
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
