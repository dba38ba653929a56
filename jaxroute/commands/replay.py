"""`jaxroute replay SPEC --out OUT.json`: simulates one engine on a recorded list of requests."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxroute.errors import UserError, command
from jaxroute.files import write_text
from jaxroute.simulator.catalogue import load_profile
from jaxroute.simulator.engine_config import DEFAULTS
from jaxroute.simulator.replay import RUN_DEFAULTS, load_spec, replay


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
        "spec", type=Path, help="JSON with config and requests, or CSV arrival_time,prompt_len,output_len"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--profile", help="engine that replaces SPEC's: name or YAML file of a profile, or roofline:GPU:MODEL"
    )
    parser.add_argument("--x64", action="store_true", help="compute in float64 (exact for dyadic constants)")
    arguments = parser.parse_args(argv)
    if arguments.x64:
        jax.config.update("jax_enable_x64", True)
    spec = load_spec(arguments.spec)
    if arguments.profile:
        spec |= {"config": load_profile(arguments.profile)["engine"], "engine": "V1"}
    out: Path = arguments.out
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; name a file in a folder that exists and is writable")
    written = replay(spec, str(arguments.spec))
    try:
        write_text(out, json.dumps(written, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    summary = written["summary"]
    finished = sum(request["finish_time"] is not None for request in written["per_request"].values())
    ignored = sum(request.get("ignored_iter") is not None for request in written["per_request"].values())
    print(
        f"{written['status']}: {finished} of {len(written['per_request'])} requests finished, "
        f"{f'{ignored} ignored, ' * (ignored > 0)}{summary['iterations']} "
        f"iterations, {summary['preemptions']} preemptions, {summary['end_time']:.6g} s -> {out}"
    )
    return 0
