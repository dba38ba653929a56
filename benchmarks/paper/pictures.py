"""Draws one picture per question: QoS over its axis, or bars if the axis has no order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.jobs import read_evaluation
from benchmarks.paper.plan import PLANNING, Question
from benchmarks.paper.tables import Results, interval, label_of
from jaxroute.drawing import INK, OTHER_COLOUR, STYLE, TRAINED_COLOUR
from jaxroute.files import whole_file

COLOURS = {
    "round_robin": "#b5892c",
    "shortest_queue": "#c2571a",
    "bert_router": "#8a4fa3",
    "baseline_rl": "#3f7f4f",
    "score_minus_load": "#5b6fb5",
    "specialist": "#1fa3b8",
    "trained_with_3_experts": "#1fa3b8",
    "trained_on_vllm_v1": "#1fa3b8",
    "trained_on_trace": "#1fa3b8",
}
"""Colours of single curves; planning routers are in ink, and the others in grey."""


def picture(path: Path, out: Path, question: Question) -> None:
    """Writes a PNG of the mean QoS with 95 % intervals."""
    results = {setting.point: read_evaluation(out, setting) for setting in question.settings}
    with rc_context(STYLE):
        numeric = all(point.replace(".", "").isdigit() for point in results)
        if numeric and len(results) > 1:
            figure = Figure(figsize=(9.5, 5), layout="constrained")
            _curves(figure.subplots(), results, question)
        elif len(results) > 1:
            figure = Figure(figsize=(8, 1.4 + 0.42 * len(results)), layout="constrained")
            _bars(figure.subplots(), {point: values["trained"] for point, values in results.items()}, question)
        else:
            values = next(iter(results.values()))
            figure = Figure(figsize=(8, 1.4 + 0.36 * len(values)), layout="constrained")
            order = sorted(values, key=lambda name: interval(values[name]).mean, reverse=True)
            _bars(figure.subplots(), {label_of(name): values[name] for name in order}, question)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def _curves(axes: Axes, results: dict[str, Results], question: Question) -> None:
    names = list(dict.fromkeys(name for of_point in results.values() for name in of_point))
    means: dict[str, float] = {}
    for name in names:
        points = [(float(point), interval(of_point[name])) for point, of_point in results.items() if name in of_point]
        x, y = [at for at, _ in points], np.array([value.mean for _, value in points])
        width = np.array([value.half_width for _, value in points])
        main = name == "trained"
        colour = TRAINED_COLOUR if main else INK if name in PLANNING else COLOURS.get(name, OTHER_COLOUR)
        dashes = {"lookahead": "--", "clairvoyant": ":"}.get(name, "-")
        single = name == "specialist"
        axes.plot(
            x,
            y,
            color=colour,
            linestyle="none" if single else dashes,
            marker="D" if single else "o" if main else None,
            linewidth=2.6 if main else 1.6 if name in COLOURS or name in PLANNING else 0.9,
            zorder=3 if main or single else 2,
            label=label_of(name),
        )
        axes.fill_between(x, y - width, y + width, color=colour, alpha=0.15, linewidth=0)
        means[label_of(name)] = float(np.mean(y))
    axes.set(title=question.title, xlabel=question.axis, ylabel="mean QoS per request, 95 % interval", ylim=(0, None))
    axes.set_xticks([float(point) for point in results])
    handles, labels = axes.get_legend_handles_labels()
    order = np.argsort([-means[label] for label in labels])
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9
    )


def _bars(axes: Axes, rows: dict[str, list[dict[str, list[float]]]], question: Question) -> None:
    values = [interval(row) for row in rows.values()]
    main = ("default", label_of("trained"), label_of("trained_on_trace"))
    colours = [TRAINED_COLOUR if name in main else OTHER_COLOUR for name in rows]
    y = np.arange(len(rows))[::-1]
    axes.barh(y, [v.mean for v in values], xerr=[v.half_width for v in values], color=colours, height=0.62, capsize=3)
    for at, value in zip(y, values, strict=True):
        text = f"{value.mean:.4f}"
        axes.annotate(text, (value.high, at), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(y, list(rows))
    axes.set_xlim(0, 1.15 * max(value.high for value in values))
    axes.set(title=question.title, xlabel="mean QoS per request, 95 % interval")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
