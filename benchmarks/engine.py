"""Replays the recorded runs of vLLM (tests/data/vllm_schedules) on many engines at a time, in float32.

It runs by jumps from event to event and iteration by iteration. Each engine replays one of the 15 recordings, which are
padded to the longest one. Rates are requests/s, and scheduled requests x iterations per second (`entries`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from benchmarks.baselines import event_note, event_simulator, on_all_cores
from benchmarks.harness import Column, Parser, Row, cores, count, machine, measure, report, table
from jaxroute.errors import command
from jaxroute.simulator.recorded import replay_by_iterations, replay_by_jumps
from tests.reference import engine as reference
from tests.replaying import Batch

SCHEDULES = Path(__file__).parents[1] / "tests" / "data" / "vllm_schedules"
COLUMNS = (
    Column("way", "by", ""),
    Column("num_engines", "engines"),
    Column("slowest", "slowest"),
    Column("median", "median"),
    Column("fastest", "fastest"),
    Column("entries", "entries/s, median"),
    Column("compile_seconds", "compile, s", ".1f"),
    Column("times_event", "x events", ".4f"),
    Column("times_python", "x Python", ",.2f"),
)


def load_schedules() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SCHEDULES.glob("*.json"))]


def _baselines(schedules: Sequence[dict[str, Any]], requests: int) -> Row:
    """Requests/s of the event-driven simulator, with all recordings on each core, and of the plain reference."""
    event = None
    if event_simulator is not None:
        replays = [event_simulator.Replay.of(schedule) for schedule in schedules]
        work = lambda replays: [replay.run() for replay in replays for _ in range(20)]  # noqa: E731
        event = 20 * requests * cores() / on_all_cores(work, [replays] * cores())
    start = time.perf_counter()
    for schedule in schedules:
        reference.simulate(schedule)
    return {"event_rate": event, "python_rate": requests / (time.perf_counter() - start)}


def measure_engines(ways: Sequence[str], sizes: Sequence[int], repeats: int) -> list[Row]:
    """One row per way and number of engines."""
    schedules = load_schedules()
    longest = max(schedule["summary"]["iterations"] for schedule in schedules)
    most_requests = max(len(schedule["requests"]) for schedule in schedules)
    runs = {
        "jumps": replay_by_jumps,
        "iterations": lambda recording, engine: replay_by_iterations(recording, engine, longest)[0],
    }
    baselines = _baselines(schedules, sum(len(schedule["requests"]) for schedule in schedules))
    rows = []
    for size in sizes:
        replayed = [schedules[index % len(schedules)] for index in range(size)]
        requests = sum(len(schedule["requests"]) for schedule in replayed)
        entries = sum(schedule["summary"]["scheduled_entries"] for schedule in replayed)
        batch = Batch(replayed, most_requests)
        for way in ways:

            def run(carry: Any, key: jax.Array, engine: Any, recording: Any, way: str = way) -> tuple[Any, Any]:
                del key
                return carry, jax.vmap(runs[way])(recording, engine)

            row, _, _ = measure(run, (), (batch.engine, batch.recording), requests, repeats)
            per_second = row["median"]
            event, python = baselines["event_rate"], baselines["python_rate"]
            rows.append(
                {
                    "way": way,
                    "num_engines": size,
                    **row,
                    **baselines,
                    "entries": per_second * entries / requests,
                    "times_event": event and per_second / event,
                    "times_python": per_second / python,
                }
            )
    return rows


def engine_table(rows: Sequence[Row]) -> Table:
    return table("engine: requests/s", COLUMNS, rows, event_note(rows))


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("engine", __doc__)
    parser.add_argument("--num-engines", type=count, nargs="+", metavar="B", help="engines at a time (default 15 240)")
    parser.add_argument(
        "--ways", nargs="+", choices=("jumps", "iterations"), help="ways to run (default: both; with --quick jumps)"
    )
    parser.add_measuring()
    arguments = parser.read(argv)
    ways = arguments.ways or (["jumps"] if arguments.quick else ["jumps", "iterations"])
    sizes = arguments.num_engines or ([15] if arguments.quick else [15, 240])
    rows = measure_engines(ways, sizes, arguments.repeats)
    report([engine_table(rows)], {"entry": "engine", "machine": machine(argv, "engine"), "rows": rows}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
