"""`jaxroute calibrate LOG`: estimates the engine of a real server from its request log.

LOG has the arrivals, lengths, first- and last-token times of requests, as a server or a benchmark tool recorded them
(docs/formats.md). The resulting profile can be used for an expert of any environment, and by `jaxroute replay`.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console

from jaxroute.calibration import report
from jaxroute.calibration.judgement import Server, Split, Times, judge, load_at_arrival, run, series, splits
from jaxroute.calibration.logs import ServerLog, load_log
from jaxroute.calibration.options import ServerOptions, check_fits, load_options
from jaxroute.calibration.progress import SearchProgress
from jaxroute.calibration.search import Fit, Simulator, search
from jaxroute.calibration.space import LATENCY, OVERHEAD, PREFIX_HITS, Space, max_model_len, peak_running, search_space
from jaxroute.calibration.uncertainty import IDENTIFIED, ParameterInterval, intervals
from jaxroute.commands.reading import add_reading_options, print_readings
from jaxroute.errors import UserError, command
from jaxroute.files import write_text
from jaxroute.runs.devices import use_all_cores
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.roofline import MODELS, known_in, roofline_by_name
from jaxroute.workload.reading import collect_readings

LANES = 64
"""Number of candidates at once on each device."""

SHARES = (0.55, 0.70, 0.82)
"""Shares of the total time at which the fits of the splits end; intervals and report use the rest."""


def server_of(space: Space, options: ServerOptions, log: ServerLog, values: dict[str, float]) -> Server:
    """The server with the parameters `values` by name; its engine has the format of `jaxroute replay`."""
    engine: dict[str, Any] = {**options.engine, "latency": [values[name] for name in LATENCY]}
    engine.setdefault("max_model_len", max_model_len(log))
    for name in ("num_gpu_blocks", "max_num_seqs", "max_num_batched_tokens"):
        if name in values:
            engine[name] = round(values[name])
    return Server(engine, space.num_engines, values.get(PREFIX_HITS, 0.0), values[OVERHEAD])


def roofline_guess(log: ServerLog, options: ServerOptions) -> tuple[Server, str] | None:
    """The roofline guess for the GPU and model that the options name, and these names; None if they are unknown."""
    gpu, model = known_in(options.gpu, GPUS), known_in(options.model, MODELS)
    if gpu is None or model is None:
        return None
    try:
        guessed = roofline_by_name(gpu, model, options.tensor_parallel_size)
    except UserError:
        return None
    engine = {**guessed, **options.engine}
    engine["max_model_len"] = max(engine["max_model_len"], max_model_len(log))
    hits = 1.0 if options.enable_prefix_caching else 0.0
    return Server(engine, options.data_parallel_size, hits), f"{gpu}, {model}"


def warnings_of(found: dict[str, ParameterInterval], values: dict[str, float], options: ServerOptions) -> list[str]:
    """One line for each parameter that the log does not identify."""
    lines = []
    for name, interval in found.items():
        if not interval.identified:
            lines.append(
                f"{name} is not identified by this log: {values[name]:.3g}, 95 % interval {interval.low:.3g} to "
                f"{interval.high:.3g} (more than {IDENTIFIED:.0%} to a side)"
            )
    if "max_model_len" in options.unknown:
        lines.append(
            "max_model_len is not identified by this log: all values from its longest request on give the same times"
        )
    return lines


def profile_text(
    name: str,
    log: ServerLog,
    options: ServerOptions,
    server: Server,
    found: dict[str, ParameterInterval],
    warnings: list[str],
    judged: dict[str, Any],
    split: Split,
) -> str:
    """The YAML of the profile."""
    arrivals = float(log.arrival[-1])
    tree: dict[str, Any] = {
        "name": name,
        "guess": False,
        "engine": {
            key: [_short(number) for number in value] if key == "latency" else value
            for key, value in server.engine.items()
        },
        "data_parallel_size": server.num_engines,
        "request_overhead": _short(server.request_overhead),
        "source": {
            "log": log.path.name,
            "requests": len(log),
            **({} if log.reading is None else {"read": {**log.reading.facts(), "file": log.path.name}}),
            "engine": Path(options.source).name,
            "model": options.model,
            "gpu": options.gpu,
            "tensor_parallel_size": options.tensor_parallel_size,
            "made_by": "jaxroute calibrate",
        },
        "fit": {
            "judged_on": split.name,
            **{
                f"{metric}_mean_error": _short(judged[metric]["error"]["mean"])
                for metric in ("ttft", "tpot", "e2e")
                if metric in judged
            },
            "e2e_median_request_error": _short(judged["e2e"]["median_error"]),
            "makespan_error": _short(judged["makespan"]["error"]),
            "prefix_hits": _short(server.prefix_hits),
            "intervals": {key: [_short(value.low), _short(value.high)] for key, value in found.items()},
            "not_identified": [key for key, value in found.items() if not value.identified]
            + [key for key in ("max_model_len",) if key in options.unknown],
        },
        "load": {
            "requests_per_s": _short((len(log) - 1) / arrivals) if arrivals else None,
            "requests_in_server_at_arrival": [
                int(value) for value in np.quantile(load_at_arrival(log), (0.05, 0.5, 0.95))
            ],
            "most_running": peak_running(log),
            "prompt_tokens": [int(value) for value in np.quantile(log.prompt_tokens, (0.05, 0.5, 0.95))],
            "output_tokens": [int(value) for value in np.quantile(log.output_tokens, (0.05, 0.5, 0.95))],
        },
    }
    head = "".join(f"# {line}\n" for line in ("Quantiles of load are 5, 50 and 95 %. Times in seconds.", *warnings))
    return head + yaml.safe_dump(tree, sort_keys=False, width=120)


def _short(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else value


def _writable(path: Path, option: str) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written; name a file in a folder that exists and is writable")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fits an engine to a log; writes its profile, a picture and a page. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute calibrate",
        description="Estimate the engine of a real server from its request log, and the accuracy of the estimate.",
        epilog="Beside PROFILE.yaml it writes PROFILE.png and PROFILE.html. Formats: docs/formats.md.",
    )
    parser.add_argument(
        "log", type=Path, help="requests with times of tokens: JSONL, CSV, or the result of a benchmark tool"
    )
    add_reading_options(parser)
    parser.add_argument(
        "--engine", type=Path, help="YAML of engine options, or *_config.json; null or missing ones are estimated"
    )
    parser.add_argument(
        "--out", type=Path, help="profile to write (default: LOG's name with .yaml, in the current folder)"
    )
    parser.add_argument(
        "--deadline", type=float, default=280.0, metavar="S", help="total time in seconds (default 280)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the search and the bootstrap (default 0)")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    if not 10 <= arguments.deadline < math.inf:
        raise UserError(f"--deadline {arguments.deadline:g}: must be 10 seconds or more")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: must be 0 or more")
    out: Path = arguments.out or Path(f"{arguments.log.stem}.yaml")
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a profile ends in .yaml")
    _writable(out, "--out")
    with collect_readings():
        log = load_log(arguments.log, time_unit=arguments.time_unit, run=arguments.run)
    options = load_options(arguments.engine)
    check_fits(log, options)
    use_all_cores()
    console = Console(stderr=True)
    space = search_space(log, options)
    if log.reading is not None:
        print_readings([log.reading])
    simulator = Simulator(space, log, LANES * jax.device_count())
    parts = splits(log)
    fits: list[Fit] = []
    with SearchProgress(console, begin + arguments.deadline) as progress:
        for split, share in zip(parts, SHARES, strict=False):
            until = begin + share * arguments.deadline
            if fits and time.monotonic() > until - 0.05 * arguments.deadline:
                break  # the remaining time is for the intervals
            progress.start(split.name, simulator)
            fits.append(search(simulator, split.fitted, arguments.seed, until, progress.update))
        progress.start("intervals of the parameters", simulator)
        found = intervals(simulator, fits[0], parts[0].fitted, arguments.seed)
        progress.start("judgement and report", simulator)
        write_results(log, options, space, list(zip(parts, fits, strict=False)), found, out)
    seconds = time.monotonic() - begin
    print(f"{simulator.evaluated:,} candidates, {seconds:.0f} s -> {out}, {out.stem}.png, {out.stem}.html")
    return 0


def write_results(
    log: ServerLog,
    options: ServerOptions,
    space: Space,
    fitted: list[tuple[Split, Fit]],
    found: dict[str, ParameterInterval],
    out: Path,
) -> None:
    """Computes the errors of every fit, prints the tables, and writes the profile, the picture and the page."""
    rows, first = [], None
    for split, fit in fitted:
        server = server_of(space, options, log, space.values(fit.point))
        times = run(log, server)
        judged = judge(log, times, ~split.fitted)
        rows.append(report.split_row(split.name, judged))
        if first is None:
            first = server, times, judged
    assert first is not None
    server, times, judged = first
    split, fit = fitted[0]
    guess = roofline_guess(log, options)
    guessed: Times | None = None
    if guess is not None:
        guessed = run(log, guess[0])
        rows.append(report.split_row(f"roofline guess ({guess[1]}), not fitted", judge(log, guessed, ~split.fitted)))
    else:
        rows.append(["roofline guess: the engine file names no known GPU and model", *[""] * 5])
    values = space.values(fit.point)
    warnings = warnings_of(found, values, options)
    if not all(own.complete for _, own in fitted):
        warnings.insert(
            0, "the deadline ended a search early, so errors may be larger than necessary; use a larger --deadline"
        )
    parameters = []
    for name, value in values.items():
        if name in found:
            own = found[name]
            state = "" if own.identified else "not identified"
            parameters.append([name, f"{value:.4g}", f"{own.low:.4g} to {own.high:.4g}", state])
        else:
            parameters.append([name, "0", "", "not needed by the log"])
    text = profile_text(out.stem, log, options, server, found, warnings, judged, split)
    tables = [
        ("Errors on requests that were not fitted", report.SPLIT_HEAD, rows),
        (f"Latencies ({split.name})", report.ERROR_HEAD, report.error_rows(judged)),
        ("Parameters, s and tokens", report.PARAMETER_HEAD, parameters),
    ]
    for heading, head, lines in tables:
        print(f"{heading}\n\n{report.text_table(head, lines)}\n")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    png = out.with_suffix(".png")
    report.picture(png, log, ~split.fitted, times, guessed, series(log, server))
    about = f"{len(log)} requests of {log.path.name}, engine options of {Path(options.source).name}."
    write_text(out.with_suffix(".html"), report.page(f"Calibration of {out.stem}", about, warnings, tables, png, text))
    write_text(out, text)
