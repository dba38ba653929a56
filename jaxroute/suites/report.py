"""The tables and the picture of a suite's results."""

from pathlib import Path

from jaxroute.drawing import INK, OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.evaluation.statistics import Interval
from jaxroute.files import write_text
from jaxroute.suites.results import Results

TABLE, PICTURE = "table.md", "leads.png"
_COLOURS = (TRAINED_COLOUR, OTHER_COLOUR, "#d1495b", "#edae49", "#66a182", "#6a4c93")
_LOWEST = -10.0  # %, where the picture ends; a lead below it is written beside the edge
_RULES = ("index_rule", "best_other_rule", "ceiling")


def write_report(folder: Path, results: Results) -> None:
    """Writes table.md and leads.png into `folder`."""
    write_text(folder / TABLE, tables(results))
    leads_picture(folder / PICTURE, results)


def learners(results: Results) -> list[str]:
    """The columns whose leads over the best rule are reported: the trained ones and those that were added."""
    return [name for name in _names(results) if name not in _RULES]


def tables(results: Results) -> str:
    """Markdown: QoS, leads over the best rule, and shares of the gap to the ceiling."""
    suite, others = results.suite, learners(results)
    names = [name for name in _names(results) if name != "ceiling"]
    environments = [name for name in suite.environments if any(name in results.columns[column] for column in names)]
    rows = {name: [_mean(results.mean(column, name)) for column in names] for name in environments}
    episodes, short = suite.evaluation, suite.short
    lines = [
        f"# {suite.name}",
        "",
        f"QoS per request, means over {episodes.number} episodes of {episodes.length:,} requests and over runs; ± is "
        "half of a 95 % interval over episodes.",
        *_table(["environment", *names], rows),
        f"Lead over the best rule, which was chosen on {suite.selection.number} other episodes: the mean over runs "
        "with its paired 95 % interval, and the worst run.",
        *_table(
            ["environment", "best rule", *others],
            {
                name: [results.best_rule.get(name, "-"), *(_lead(results, column, name) for column in others)]
                for name in environments
            },
        ),
        f"Share of the gap between the best rule and the ceiling ({suite.ceiling}) that is closed, on {short.number} "
        f"episodes of {short.length:,} requests.",
        *_table(
            ["environment", "best rule", "ceiling", *others],
            {
                name: [
                    _mean(results.mean(results.best_rule.get(name, ""), name, "short")),
                    _mean(results.mean("ceiling", name, "short")),
                    *(_share(results.share(column, name)) for column in others),
                ]
                for name in environments
            },
        ),
    ]
    return "\n".join(lines)


def leads_picture(path: Path, results: Results) -> None:
    """Writes a PNG of the leads over the best rule, in % of its QoS, with paired 95 % intervals."""
    names = learners(results)
    leads = {}
    for environment in results.suite.environments:
        rule = results.mean(results.best_rule.get(environment, ""), environment)
        for column in names:
            lead = results.lead(column, environment)
            if lead is not None and rule is not None and rule.mean > 0:
                leads[column, environment] = Interval(*(100 * value / rule.mean for value in lead))
    environments = [name for name in results.suite.environments if any(pair[1] == name for pair in leads)]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # so that no line crosses the text
    with picture(path, 9, 1.4 + (0.15 + 0.19 * len(names)) * len(environments)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for number, column in enumerate(names):
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([], [], color=colour, marker="o", label=column)
            for row, environment in enumerate(environments):
                if (column, environment) in leads:
                    mean, half = leads[column, environment]
                    y = row + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                    x, text = max(mean, _LOWEST), f"{mean:+.1f} ± {half:.1f}"
                    if mean > _LOWEST:
                        axes.errorbar(x, y, xerr=half, color=colour, marker="o", markersize=5, capsize=3, linewidth=1.6)
                    else:
                        axes.plot(x, y, color=colour, marker="<", markersize=6)
                    shift = max(mean + half, x), y
                    axes.annotate(text, shift, (8, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
        axes.set(
            title=f"{results.suite.name}: lead over the best rule",
            xlabel="QoS less that of the best rule, % of it; paired 95 % interval over episodes",
            yticks=range(len(environments)),
            yticklabels=environments,
            ylim=(len(environments) - 0.5, -0.5),
        )
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower left", ncols=4, fontsize=9)


def _names(results: Results) -> list[str]:
    """All columns with results, the suite's own first."""
    own = results.suite.columns
    return [*(name for name in own if name in results.columns), *(name for name in results.columns if name not in own)]


def _table(head: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *([name, *row] for name, row in rows.items()))]
    return ["", lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _mean(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.4f} ± {interval.half_width:.4f}"


def _lead(results: Results, column: str, environment: str) -> str:
    lead, worst = results.lead(column, environment), results.worst_lead(column, environment)
    if lead is None or worst is None:
        return "-"
    clear = "**" if lead.low > 0 else ""
    return f"{clear}{lead.mean:+.4f} ± {lead.half_width:.4f}{clear}, worst {worst:+.4f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{round(100 * share)} %"
