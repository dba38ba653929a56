"""Recovery: calibrates logs of random engines with known coefficients and noise, as `jaxroute calibrate` does.

Every engine serves three logs at 0.3, 0.8 and 1.5 times the rate that it can sustain. The estimate of a coefficient
that the calibration calls identified must be within 5 % of the truth; the others must be flagged.

    python -m benchmarks.calibration [--engines N] [--requests R] [--lanes K] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.calibration.judgement import Server, run
from jaxroute.calibration.logs import ServerLog
from jaxroute.calibration.options import ServerOptions
from jaxroute.calibration.search import Simulator, search
from jaxroute.calibration.space import LATENCY, search_space
from jaxroute.calibration.uncertainty import IDENTIFIED, intervals
from jaxroute.errors import command
from jaxroute.files import write_text
from jaxroute.runs.compilation_cache import keep_compiled_programs

LOADS = (0.3, 0.8, 1.5)
NOISE = 0.02
_RANGES = ((5e-3, 4e-2), (2e-5, 2e-4), (1e-5, 5e-4), (2e-8, 5e-7), (64.0, 512.0), (2e-5, 2e-4))


def random_engine(random: np.random.Generator) -> dict[str, Any]:
    """Options of an engine with random coefficients in the range of current GPUs."""
    low, high = np.log(np.asarray(_RANGES)).T
    return {
        "latency": np.exp(random.uniform(low, high)).tolist(),
        "num_gpu_blocks": int(random.integers(1500, 6000)),
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
    }


def random_log(
    random: np.random.Generator, engine: dict[str, Any], load: float, requests: int, noise: float
) -> ServerLog:
    """Poisson arrivals at `load` times the engine's capacity, ShareGPT-like lengths, and times with relative noise."""
    prompt = np.clip(np.exp(random.normal(5.3, 1.0, requests)), 4, 2000).astype(np.int32)
    output = np.clip(np.exp(random.normal(4.2, 0.8, requests)), 2, 400).astype(np.int32)

    def served(arrival: np.ndarray) -> ServerLog:
        ids, never = np.arange(requests), np.full(requests, np.inf)
        log = ServerLog(Path("random"), ids, arrival, never, never, prompt, output, None)
        times = run(log, Server(engine))
        ttft = (times.first_token - arrival) * (1 + noise * random.standard_normal(requests))
        rest = (times.finish - times.first_token) * (1 + noise * random.standard_normal(requests))
        return ServerLog(Path("random"), ids, arrival, arrival + ttft, arrival + ttft + rest, prompt, output, None)

    at_once = served(np.zeros(requests))
    gaps = random.exponential(at_once.finish.max() / requests / load, requests)
    return served(np.cumsum(gaps) - gaps[0])


def recover(
    log: ServerLog, engine: dict[str, Any], lanes: int, seed: int, generations: int = 60
) -> list[dict[str, Any]]:
    """One row per coefficient: true and estimated value, interval, whether it is identified, relative error."""
    options = ServerOptions("known options", {key: value for key, value in engine.items() if key != "latency"})
    simulator = Simulator(search_space(log, options), log, lanes)
    everyone = np.ones(len(log), bool)
    fit = search(simulator, everyone, seed, time.monotonic() + 600, lambda *_: None, generations)
    found, values = intervals(simulator, fit, everyone, seed), simulator.space.values(fit.point)
    rows = []
    for name, true in zip(LATENCY, engine["latency"], strict=True):
        own = found[name]
        error = values[name] / true - 1
        rows.append({"name": name, "true": true, "found": values[name], "error": error, **own._asdict()})
    return rows


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--lanes", type=int, default=64, help="candidates at once")
    parser.add_argument("--first", type=int, default=0, help="number of the first engine, to run the engines in parts")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    keep_compiled_programs()
    results = []
    for number in range(arguments.first, arguments.first + arguments.engines):
        random = np.random.default_rng(number)
        engine = random_engine(random)
        for load in LOADS:
            begin = time.monotonic()
            log = random_log(random, engine, load, arguments.requests, NOISE)
            rows = recover(log, engine, arguments.lanes, number)
            results += [{"engine": number, "load": load, **row} for row in rows]
            shown = ", ".join(
                f"{row['name']} {100 * row['error']:+.1f} %{'' if row['identified'] else ' (flagged)'}" for row in rows
            )
            print(
                f"engine {number}, load {load}, {time.monotonic() - begin:.0f} s: {shown}", file=sys.stderr, flush=True
            )
            if arguments.out:
                write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    for load in LOADS:
        print(f"load {load}: {summary([row for row in results if row['load'] == load])}")
    return 0


def summary(rows: list[dict[str, Any]]) -> str:
    called = [row for row in rows if row["identified"]]
    good = [row for row in called if abs(row["error"]) <= IDENTIFIED]
    worst = max((abs(row["error"]) for row in called), default=0.0)
    kept = {name: sum(row["name"] == name for row in called) for name in LATENCY}
    return (
        f"{len(called)} of {len(rows)} coefficients identified, {len(good)} of these within {IDENTIFIED:.0%}, worst "
        f"{worst:.1%}; by name {kept}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
