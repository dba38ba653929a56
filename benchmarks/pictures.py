"""Draws the cost per decision against the number of experts and of slots, log-log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.harness import Row
from jaxroute.drawing import STYLE
from jaxroute.files import whole_file

COLOURS = {"advance": "#0b6e8a", "environment": "#c2571a", "event simulator": "#9aa5ad"}


def cost_curves(path: Path, key: str, unit: str, title: str, rows: Mapping[str, Sequence[Row]]) -> None:
    """Writes a PNG: microseconds per decision of each benchmark over `key`, a number in its rows, and of the event
    simulator in the runs of the first benchmark. Dotted lines show proportional growth from the first point.
    """
    lines = {name: [(row[key], 1e6 / row["median"]) for row in of_entry] for name, of_entry in rows.items()}
    first = next(iter(rows.values()))
    if all(row["event_rate"] for row in first):
        lines["event simulator"] = [(row[key], 1e6 / row["event_rate"]) for row in first]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            colour = COLOURS[name]
            axes.plot(x, y, color=colour, marker="o", linewidth=1.8, label=name)
            axes.plot(x, [y[0] * at / x[0] for at in x], color=colour, linestyle=":", linewidth=1)
            for at, cost in zip(x, y, strict=True):
                axes.annotate(f"{cost:.3g}", (at, cost), (0, -13), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="microseconds a decision", title=title)
        axes.set_xticks(sorted({row[key] for row in first}))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.15)
        axes.legend(loc="best", title="dotted: in proportion")
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
