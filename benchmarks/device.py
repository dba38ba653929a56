"""All checks and rates of a machine with a GPU, without a network: whether the recorded schedules and random engines
are equal on the device, its rates, and the duration of the paper's training of 1M frames.

`python -m benchmarks.device` runs all parts; --parts selects some, if a machine is available only for minutes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import advance, environment, policy
from benchmarks.decisions import Rollout, Setting, measure_setting
from benchmarks.engine import load_schedules
from benchmarks.harness import Column, Parser, Row, count, machine, report, table
from benchmarks.training import measure_training
from jaxroute.agent.trainer import make_trainer
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import config_folder, load_config
from jaxroute.errors import command

ROLLOUTS: dict[str, Rollout] = {
    "advance": advance.rollout,
    "environment": environment.rollout,
    "policy": policy.rollout,
}
PARTS = ("schedules", "fuzz", *ROLLOUTS, "paper")
BATCHES = (1024, 4096, 16384, 65536)
FRAMES = 1_000_000
COLUMNS = (
    Column("part", "part", ""),
    Column("setting", "setting", ""),
    Column("result", "result", ""),
    Column("spread", "slowest to fastest", ""),
    Column("compile_seconds", "compile, s", ".1f"),
    Column("traffic_share", "XLA traffic", ".0%"),
    Column("state_share", "2 x state", ".1%"),
    Column("times_event", "x events", ".3f"),
    Column("times_python", "x Python", ",.1f"),
)


def schedules(arguments: Any) -> Iterator[Row]:
    """The 15 recorded schedules of vLLM, in both ways: exact in float64, in float32 with times within 1e-4."""
    from tests.replaying import Batch

    wanted = load_schedules()
    for x64 in (True, False):
        with jax.enable_x64(x64):
            batch = Batch(wanted, max(len(schedule["requests"]) for schedule in wanted))
            ways = {
                "jumps": batch.by_jumps(),
                "iterations": batch.by_iterations(max(schedule["summary"]["iterations"] for schedule in wanted)),
            }
        for way, got in ways.items():
            equal = sum(_same(one, schedule, x64) for one, schedule in zip(got, wanted, strict=True))
            precision = "float64" if x64 else "float32"
            yield _check("schedules", f"{len(wanted)} by {way}, {precision}", equal, len(wanted))


def _same(got: Any, wanted: Any, exact: bool) -> bool:
    """Whether a replay equals the recorded schedule in all values that both have."""
    if isinstance(got, dict):
        return isinstance(wanted, dict) and all(_same(got[key], wanted[key], exact) for key in got if key in wanted)
    if isinstance(got, list):
        return wanted is None or len(got) == len(wanted) and all(map(_same, got, wanted, [exact] * len(got)))
    if isinstance(got, float) and isinstance(wanted, float) and not exact:
        return math.isclose(got, wanted, rel_tol=1e-4)
    return got == wanted


def fuzz(arguments: Any) -> Iterator[Row]:
    """Random engines: jumps and iterations against the plain Python reference, exact in float64."""
    from tests.fuzz import CHUNK, differences
    from tests.reference.cases import random_case

    rng = np.random.default_rng(0)
    cases = arguments.cases or (10 if arguments.quick else 2000)
    different: set[str] = set()
    for done in range(0, cases, CHUNK):
        for line in differences([random_case(rng) for _ in range(min(CHUNK, cases - done))]):
            different.add(f"{done} {line.partition(':')[0]}")
            print(f"after {done} cases, {line}", file=sys.stderr)
    yield _check("fuzz", f"{cases:,} random engines, both ways", cases - len(different), cases)


def _check(part: str, setting: str, equal: int, total: int) -> Row:
    result = f"{equal:,} of {total:,} equal"
    return {"part": part, "setting": setting, "result": result, "equal": equal, "total": total}


def rates(part: str, arguments: Any) -> Iterator[Row]:
    """Decisions/s of a benchmark over batch sizes."""
    for num_envs in arguments.num_envs or ([64] if arguments.quick else BATCHES):
        setting = Setting(num_envs, slots=arguments.slots, steps=arguments.steps)
        row = measure_setting(ROLLOUTS[part], setting, arguments.repeats, arguments.quick)
        yield _rate(part, f"{num_envs:,} environments, 6 experts", row, "decisions")


def _rate(part: str, setting: str, row: Row, unit: str) -> Row:
    spread = f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
    return {**row, "part": part, "setting": setting, "result": f"{row['median']:,.0f} {unit}/s", "spread": spread}


def paper(arguments: Any) -> Iterator[Row]:
    """The paper's settings, one update of 256 per frame: `--train-envs` environments, and as many updates per step."""
    envs = arguments.train_envs or (2 if arguments.quick else 32)
    steps = max((64 if arguments.quick else 2048) // envs, 1)
    path = config_folder() / "paper.yaml"
    overrides = [
        f"training.num_envs={envs}",
        f"training.updates_per_step={envs}",
        f"training.buffer_capacity={100_000 // envs * envs}",
        f"training.steps_per_chunk={steps}",
        *arguments.overrides,
    ]
    setting = f"paper.yaml, {envs} environments"
    if not arguments.full:
        row = measure_training(path, overrides, arguments.repeats, second_start=False)
        row = _rate("paper", setting, row, "frames")
        minutes = FRAMES / row["median"] / 60
        yield {**row, "minutes": minutes}
        yield {"part": "paper", "setting": f"{FRAMES:,} frames, extrapolated", "result": f"{minutes:,.1f} minutes"}
        return
    env, params, network, hyper, sac, *_ = build_experiment(load_config(path, overrides))
    trainer = make_trainer(env, network, sac)
    start = time.perf_counter()
    state = trainer.init(jax.random.key(0), params, hyper)
    metrics: dict[str, jax.Array] = {}
    for _ in range(-(-FRAMES // (sac.num_envs * sac.steps_per_chunk))):
        state, metrics = jax.block_until_ready(trainer.train_chunk(state, params, hyper))
    minutes = (time.perf_counter() - start) / 60
    result = f"{minutes:,.1f} minutes, QoS {float(metrics['qos']):.3f}"
    yield {"part": "paper", "setting": f"{FRAMES:,} frames, with compilation", "result": result, "minutes": minutes}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("device", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    parser.add_argument("--cases", type=count, metavar="N", help="random engines (default 2000; 10 with --quick)")
    parser.add_argument("--num-envs", type=count, nargs="+", metavar="B", help="batch sizes (default 1024 to 65536)")
    parser.add_argument("--slots", type=count, default=48, help="slots per expert (default 48)")
    parser.add_argument("--steps", type=count, help="steps per call (default: for calls of about a second)")
    parser.add_argument("--train-envs", type=count, metavar="E", help="environments of the training (default 32)")
    parser.add_argument("--full", action="store_true", help="train the paper's 1M frames instead of extrapolating")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="key=value", help="changes of configs/paper.yaml")
    parser.add_measuring()
    arguments = parser.read(argv)
    parts = {"schedules": schedules, "fuzz": fuzz, "paper": paper}
    rows: list[Row] = []
    for part in arguments.parts:
        produced = parts[part](arguments) if part in parts else rates(part, arguments)
        for row in produced:
            rows.append(row)
            print(f"{part}: {row['setting']}: {row['result']}", file=sys.stderr, flush=True)
    caption = (
        "rates in float32 on paper-6 at 6 requests/s, times in seconds; x events, x Python: relative "
        "to the compiled event-driven simulator on all cores and to the plain reference on one; XLA traffic and "
        "2 x state: shares of the measured memory bandwidth (benchmarks/README.md)"
    )
    record = {"entry": "device", "machine": machine(argv, "device"), "rows": rows}
    report([table("device", COLUMNS, rows, caption)], record, arguments.json)
    return 0 if all(row.get("equal") == row.get("total") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
