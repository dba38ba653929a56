"""Runs the whole suite: advance, environment, policy, training and engine; writes tables, a JSON file and two pictures.

One quantity at a time varies around `paper-6` at 6 requests/s with 48 slots: batch size, load, number of experts (with
1 request/s per expert) and slots.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks import advance, environment, policy
from benchmarks.decisions import Rollout, Setting, decisions_table, measure_setting
from benchmarks.engine import engine_table, measure_engines
from benchmarks.harness import Parser, Row, cores, machine, report, split_cpu, writable
from benchmarks.pictures import cost_curves
from benchmarks.training import measure_training, training_table
from jaxroute.errors import UserError, command

BATCH = 1024
EXPERTS = (3, 6, 12)
SLOTS = (16, 32, 48, 64, 128)
ROLLOUTS: dict[str, Rollout] = {
    "advance": advance.rollout,
    "environment": environment.rollout,
    "policy": policy.rollout,
}
BATCHES = {
    "advance": (1, 64, 256, 1024, 4096, 16384, 65536),
    "environment": (1, 64, 256, 1024, 4096, 16384),
    "policy": (1, 64, 1024),
}


def settings(entry: str, quick: bool) -> list[Setting]:
    """The rows of a benchmark."""
    base = Setting(BATCH)
    by_experts = [replace(base, experts=experts, rate=float(experts)) for experts in EXPERTS]
    by_slots = [replace(base, slots=slots) for slots in SLOTS]
    if quick:
        spread = replace(base, num_envs=256 * jax.device_count(), shards=jax.device_count())
        few = {"advance": [base, by_experts[-1], by_slots[0]], "environment": [replace(base, num_envs=256), spread]}
        return few.get(entry, [replace(base, num_envs=64)])
    rows = [replace(base, num_envs=num_envs) for num_envs in BATCHES[entry]]
    if entry != "policy" and jax.device_count() > 1:
        rows += [replace(base, num_envs=256 * jax.device_count(), shards=jax.device_count())]
    rows += by_experts
    if entry != "policy":
        rows += [replace(base, rate=rate) for rate in (2.0, 12.0)] + by_slots
    return list(dict.fromkeys(rows))


def pictures(folder: Path, device: str, entries: dict[str, list[Row]]) -> None:
    """Draws the rows that were measured with the standard batch size."""
    folder.mkdir(parents=True, exist_ok=True)
    curves: list[tuple[str, str, str, Any]] = [
        ("experts", "experts, with 1 request/s each", "experts", lambda row: row["slots"] == 48),
        ("slots", "slots of an expert", "slots", lambda row: row["experts"] == 6),
    ]
    for key, unit, name, fixed in curves:
        rows = {
            entry: [
                row
                for row in entries[entry]
                if row["num_envs"] == BATCH and row["rate"] == row["experts"] and fixed(row)
            ]
            for entry in ("advance", "environment")
        }
        rows = {entry: of_entry for entry, of_entry in rows.items() if len(of_entry) > 1}
        cost_curves(folder / f"cost_by_{name}.png", key, unit, f"{BATCH:,} environments on {device}", rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("__main__", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results.json and pictures/ (default benchmarks; runs/benchmarks with --quick)",
    )
    arguments = parser.read(argv)
    quick = arguments.quick
    out = arguments.out or Path("runs" if quick else ".") / "benchmarks"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    writable(out / "results.json", "--out")
    repeats = 3 if quick else 5
    split_cpu(cores())

    entries: dict[str, list[Row]] = {}
    for entry, rollout in ROLLOUTS.items():
        entries[entry] = []
        for setting in settings(entry, quick):
            entries[entry].append(measure_setting(rollout, setting, repeats, quick))
            print(f"{entry}: {setting}: {entries[entry][-1]['median']:,.0f}/s", file=sys.stderr)
    shorter = ["training.steps_per_chunk=20"] if quick else []
    entries["training"] = [measure_training(None, shorter, repeats, second_start=not quick)]
    ways, sizes = (["jumps"], [15]) if quick else (["jumps", "iterations"], [15, 240])
    entries["engine"] = measure_engines(ways, sizes, repeats)

    tables = [decisions_table(entry, entries[entry]) for entry in ROLLOUTS]
    tables += [training_table(entries["training"]), engine_table(entries["engine"])]
    record: dict[str, Any] = {"machine": machine(argv, "__main__"), "entries": entries}
    pictures(out / "pictures", record["machine"]["device"], entries)
    report(tables, record, out / "results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
