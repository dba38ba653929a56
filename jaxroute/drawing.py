"""Colours and style of every picture, and how one is written."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxroute.files import whole_file

TRAINED_COLOUR, OTHER_COLOUR, INK, GRID = "#0b6e8a", "#9aa5ad", "#24323a", "#e3e8eb"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": OTHER_COLOUR,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def picture(path: Path, width: float, height: float, dpi: int = 140, **options: Any) -> Generator[Figure]:
    """Yields a figure of this size in inches, in the `STYLE`, then writes it as a PNG. `options` are `savefig`'s."""
    with rc_context(STYLE), whole_file(path) as temporary:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(temporary, format="png", dpi=dpi, **options)
