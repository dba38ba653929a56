"""`jaxroute replay SPEC --out OUT.json`: simulates one engine on a recorded list of requests."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxroute.commands.reading import add_reading_options, print_readings
from jaxroute.errors import UserError, command
from jaxroute.files import write_text
from jaxroute.simulator.catalogue import load_profile
from jaxroute.simulator.engine_config import DEFAULTS
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.presets import PRESETS, in_place_of
from jaxroute.simulator.replay import RUN_DEFAULTS, load_spec, never_served, replay
from jaxroute.workload.reading import Reading, Tally, collect_readings, make_reading

MOST_NAMED = 3
"""Requests that are named in the summary; the others are counted."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the times of every request of a recorded list as JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute replay",
        description="Simulate one engine on a recorded list of requests and write their first and last token times.",
        epilog="Defaults of engine options: "
        + ", ".join(f"{key} {value}" for key, value in {**DEFAULTS, **RUN_DEFAULTS}.items()),
    )
    parser.add_argument(
        "spec", type=Path, help="JSON with config and requests, or recorded requests in a format of docs/formats.md"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--profile", help="engine that replaces SPEC's: name or YAML file of a profile, or roofline:GPU:MODEL"
    )
    parser.add_argument(
        "--engine",
        choices=tuple(PRESETS),
        help="version of vLLM whose defaults replace those of the engine options (default: SPEC's, or without it V1)",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), help="of this --engine: its seats and token budget go by memory")
    add_reading_options(parser)
    parser.add_argument("--spread-ticks", action="store_true", help="spread requests of equal times over their tick")
    parser.add_argument(
        "--leave-out-unservable", action="store_true", help="leave out requests that the engine can never serve"
    )
    parser.add_argument("--x64", action="store_true", help="compute in float64 (exact for dyadic constants)")
    arguments = parser.parse_args(argv)
    if arguments.x64:
        jax.config.update("jax_enable_x64", True)
    with collect_readings() as readings:
        options = {"spread_ticks": arguments.spread_ticks, "time_unit": arguments.time_unit, "run": arguments.run}
        spec = load_spec(arguments.spec, **options)
    if arguments.profile:
        config = load_profile(arguments.profile)["engine"]
        config = in_place_of(config, arguments.engine) if arguments.engine else config
        spec |= {"config": config, "engine": "V1"}
    if arguments.engine:
        spec |= {"engine": arguments.engine, "gpu": arguments.gpu}
    elif arguments.gpu:
        raise UserError("--gpu: is for --engine; name a version of vLLM there, or leave it out")
    out: Path = arguments.out
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; name a file in a folder that exists and is writable")
    where = str(arguments.spec)
    reasons = never_served(spec, where)
    if not readings:
        with collect_readings() as readings:
            _read_spec(arguments.spec, spec["requests"])
    left_out = dict(reasons) if arguments.leave_out_unservable else {}
    if left_out:
        spec |= {"requests": [request for index, request in enumerate(spec["requests"]) if index not in left_out]}
        if not spec["requests"]:
            raise UserError(f"{where}: the engine can serve none of its requests; {_named(left_out)}")
    written = replay(spec, where)
    if left_out:
        kept = (index for index in range(len(left_out) + len(spec["requests"])) if index not in left_out)
        written["per_request"] = {
            str(index): request for index, request in zip(kept, written["per_request"].values(), strict=True)
        }
    written |= _saved(readings, left_out)
    try:
        write_text(out, json.dumps(written, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    print_readings(readings)
    if left_out:
        print(f"left out: {_named(left_out)}")
    summary, requests = written["summary"], written["per_request"]
    finished = sum(request["finish_time"] is not None for request in requests.values())
    ignored = sum(request.get("ignored_iter") is not None for request in requests.values())
    print(
        f"{written['status']}: {finished} of {len(requests)} requests finished, "
        f"{f'{ignored} ignored, ' * (ignored > 0)}{summary['iterations']} iterations, "
        f"{summary['preemptions']} preemptions, {_cached(summary, spec['requests'])}"
        f"{summary['end_time']:.6g} s -> {out}"
    )
    outputs = dict(zip(requests, (request["output_len"] for request in spec["requests"]), strict=True))
    stuck, short = {}, {}
    for name, request in requests.items():
        if request["finish_time"] is None or request.get("ignored_iter") is not None:
            stuck[int(name)] = reasons.get(int(name), "waits behind one that can never be served")
        elif request["emitted"] < outputs[name]:
            short[int(name)] = f"(after {request['emitted']:,} of {outputs[name]:,} tokens)"
    if written["status"] == "max_iterations":
        print("stopped at max_iterations; a larger one in config lets it go on")
    elif stuck:
        print(f"not finished: {_named(stuck)}; --leave-out-unservable runs the others without them")
    if short:
        print(f"ended early by max_model_len: {_named(short)}")
    return 0


def _read_spec(path: Path, requests: Sequence[dict[str, Any]]) -> None:
    """The facts of the requests of a spec; those that arrive by iteration have no times."""
    columns = [np.asarray([request.get(key, 0) for request in requests]) for key in ("prompt_len", "output_len")]
    times = None
    if "arrival_time" in requests[0]:
        times = np.sort([float(request["arrival_time"]) for request in requests])
    make_reading(path, "replay spec", Tally(rows=len(requests)), times, *columns)


def _saved(readings: Sequence[Reading], left_out: dict[int, str]) -> dict[str, Any]:
    """What the JSON says of the input."""
    read = {"read": [reading.facts() for reading in readings]} if readings else {}
    return {**read, **({"left_out": {str(index): why for index, why in left_out.items()}} if left_out else {})}


def _cached(summary: dict[str, Any], requests: Sequence[dict[str, Any]]) -> str:
    """The tokens that were found in the prefix cache, relative to those of all prompts; "" without such a cache."""
    if "cached_tokens" not in summary:
        return ""
    return f"{summary['cached_tokens'] / sum(request['prompt_len'] for request in requests):.1%} of tokens cached, "


def _named(reasons: dict[int, str]) -> str:
    """The first requests with their reasons, and the number of others. The ones that others wait for come first."""
    first = sorted(reasons, key=lambda index: ("waits" in reasons[index], index))
    named = ", ".join(f"request {index} {reasons[index]}" for index in first[:MOST_NAMED])
    more = len(reasons) - MOST_NAMED
    return named + (f", and {more} more" if more > 0 else "")
