"""The report of a calibration: a picture and a self-contained page."""

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxroute.calibration.judgement import STATISTICS, Times, load_at_arrival
from jaxroute.calibration.logs import ServerLog
from jaxroute.calibration.search import METRICS
from jaxroute.drawing import INK, STYLE
from jaxroute.files import whole_file

LABELS = {"ttft": "TTFT", "tpot": "time per output token", "e2e": "end to end"}
MEASURED, SIMULATED, GUESSED = INK, "#c8553d", "#8a9aa4"


def picture(
    path: Path, log: ServerLog, among: np.ndarray, times: Times, guess: Times | None, series: dict[str, np.ndarray]
) -> None:
    """Writes a PNG: latency distributions of the requests `among`, queues over time, and errors against load."""
    measured, simulated = log.measured, log.latencies(times.first_token, times.finish)
    guessed = None if guess is None else log.latencies(guess.first_token, guess.finish)
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4), layout="constrained")
        panels = figure.subplots(2, 3)
        for axes, name in zip(panels[0], METRICS, strict=True):
            scale, unit = (1e3, "ms") if name == "tpot" else (1.0, "s")
            for label, source, colour, line in (
                ("measured", measured, MEASURED, "-"),
                ("simulated", simulated, SIMULATED, "--"),
                ("roofline guess", guessed, GUESSED, ":"),
            ):
                if source is None:
                    continue
                values = np.sort(source[name][among & np.isfinite(source[name])]) * scale
                axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), line, color=colour, label=label)
            axes.set(title=LABELS[name], xlabel=unit, ylabel="share of judged requests", ylim=(0, 1.02))
        panels[0, 0].legend(loc="lower right")
        for axes, name in zip(panels[1], ("running", "waiting"), strict=False):
            if log.series is not None:
                axes.plot(log.series["t"], log.series[name], color=MEASURED, label="measured")
            axes.step(series["t"], series[name], color=SIMULATED, where="post", linewidth=0.9, label="simulated")
            axes.set(title=f"{name} requests", xlabel="s since the first arrival", ylim=(0, None))
            axes.legend(loc="upper right")
        _residuals(panels[1, 2], log, among, simulated)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def _residuals(axes: Axes, log: ServerLog, among: np.ndarray, simulated: dict[str, np.ndarray]) -> None:
    measured, load = log.measured, load_at_arrival(log)
    for name, colour, marker in (("e2e", SIMULATED, "o"), ("tpot", MEASURED, "x")):
        error = 100 * (simulated[name] / np.where(measured[name] > 0, measured[name], np.nan) - 1)
        axes.plot(load[among], error[among], marker, color=colour, markersize=3.5, label=LABELS[name], alpha=0.7)
    axes.axhline(0, color=GUESSED, linewidth=1)
    axes.set(
        title="error against load", xlabel="requests in the server at the arrival", ylabel="simulated - measured, %"
    )
    axes.legend(loc="best")


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_rows(judged: dict[str, Any]) -> list[list[str]]:
    """Rows of metric and statistic, measured, simulated and error, from the result of `judgement.judge`."""
    rows = []
    for name in METRICS:
        if name not in judged:
            continue
        scale, unit = (1e3, "ms") if name == "tpot" else (1.0, "s")
        entry = judged[name]
        for key in STATISTICS:
            real, ours = entry["measured"][key] * scale, entry["simulated"][key] * scale
            rows.append([f"{LABELS[name]}, {key}, {unit}", f"{real:.4g}", f"{ours:.4g}", _error(entry, key)])
        rows.append([f"{LABELS[name]}, median of requests' errors", "", "", _percent(entry["median_error"], False)])
    whole = judged["makespan"]
    rows.append(["makespan, s", f"{whole['measured']:.4g}", f"{whole['simulated']:.4g}", _percent(whole["error"])])
    return rows


ERROR_HEAD = ["judged requests", "measured", "simulated", "error"]
SPLIT_HEAD = ["part", "mean TTFT", "mean time per token", "mean end to end", "median request, end to end", "makespan"]
PARAMETER_HEAD = ["parameter", "value", "95 % interval", ""]


def split_row(name: str, judged: dict[str, Any]) -> list[str]:
    """A row under `SPLIT_HEAD`: the errors on one part of the log."""
    means = [_error(judged[metric], "mean") if metric in judged else "-" for metric in METRICS]
    return [name, *means, _percent(judged["e2e"]["median_error"], False), _percent(judged["makespan"]["error"])]


def _error(entry: dict[str, Any], key: str) -> str:
    """The relative error of a statistic; there is none where 0 was measured."""
    return _percent(entry["error"][key]) if entry["measured"][key] else "-"


def _percent(value: float, signed: bool = True) -> str:
    if not np.isfinite(value):
        return "does not finish"
    return f"{100 * value:+.2f} %" if signed else f"{100 * value:.2f} %"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
 body {{ margin: 0 auto; max-width: 1200px; padding: 16px 24px 40px; color: #24323a; background: #fff;
   font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; }}
 h1 {{ font-size: 20px; }} h2 {{ font-size: 15px; margin: 28px 0 8px; }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
 th, td {{ padding: 2px 20px 2px 0; text-align: right; border-bottom: 1px solid #e3e8eb; font-weight: normal; }}
 th:first-child, td:first-child {{ text-align: left; }} thead th {{ font-weight: bold; }}
 .warn {{ color: #a4341f; }} img {{ max-width: 100%; }} pre {{ background: #f5f7f8; padding: 10px; overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def page(
    title: str,
    about: str,
    warnings: list[str],
    tables: list[tuple[str, list[str], list[list[str]]]],
    png: Path,
    profile: str,
) -> str:
    """The HTML page: warnings, tables of (heading, head, rows), the picture and the text of the profile."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    parts += [f'<p class="warn">{html.escape(warning)}</p>' for warning in warnings]
    for heading, head, rows in tables:
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(
            f"<h2>{html.escape(heading)}</h2><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
        )
    data = base64.b64encode(png.read_bytes()).decode()
    parts.append(f'<h2>Picture</h2><img alt="Measured and simulated" src="data:image/png;base64,{data}">')
    parts.append(f"<h2>Profile</h2><pre>{html.escape(profile)}</pre>")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))
