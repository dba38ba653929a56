"""Frames per second of full training: environments, replay buffer and updates, as in `jaxroute train`.

The settings are those of configs/default.yaml or --config, changed by key=value. The warm-up is left out, so every
timed chunk learns. A frame is one decision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from benchmarks.baselines import Baselines, event_note
from benchmarks.harness import Column, Parser, Row, machine, measure, report, table, tree_bytes
from jaxroute.agent.trainer import make_trainer
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.errors import command

COLUMNS = (
    Column("config", "config", ""),
    Column("num_envs", "envs"),
    Column("slowest", "slowest"),
    Column("median", "median"),
    Column("fastest", "fastest"),
    Column("updates", "updates/s"),
    Column("compile_seconds", "compile, s", ".1f"),
    Column("second_start_seconds", "from cache, s", ".1f"),
    Column("state_bytes", "state, MB", ",.1f"),
    Column("traffic_share", "XLA traffic", ".0%"),
    Column("times_event", "x events", ".4f"),
    Column("times_python", "x Python", ",.2f"),
)


def measure_training(config: Path | None, overrides: Sequence[str], repeats: int, second_start: bool) -> Row:
    """One row: frames/s of chunks that learn; compile time without and with a filled persistent cache."""
    setting = load_config(config, ["agent.warmup_frames=0", *overrides])
    env, params, network, hyper, sac, *_ = build_experiment(setting)
    trainer = make_trainer(env, network, sac)
    state = trainer.init(jax.random.key(0), params, hyper)
    state_bytes = tree_bytes(state)

    def run(state: Any, key: jax.Array, params: Any, hyper: Any) -> tuple[Any, Any]:
        del key
        return trainer.train_chunk(state, params, hyper)

    frames = sac.num_envs * sac.steps_per_chunk
    row, _, metrics = measure(run, state, (params, hyper), frames, repeats, second_start=second_start)
    per_second = row["median"]
    return {
        "config": config.stem if config else "default",
        "overrides": list(overrides),
        "num_envs": sac.num_envs,
        **row,
        "updates": per_second * sac.updates_per_step / sac.num_envs,
        "state_bytes": state_bytes / 1e6,
        "traffic_share": row["step_bytes"] * per_second / sac.num_envs / row["bandwidth"],
        **Baselines(params, env.slots).measure(per_second, 0.5),
        "critic_loss": float(metrics["critic_loss"]),
    }


def training_table(rows: Sequence[Row]) -> Table:
    return table("training: frames/s", COLUMNS, rows, f"{event_note(rows)}. XLA traffic: as of advance")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("training", __doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: configs/default.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change of the configuration")
    parser.add_measuring()
    arguments = parser.read(argv)
    shorter = ["training.steps_per_chunk=20"] if arguments.quick else []
    row = measure_training(
        arguments.config, [*shorter, *arguments.overrides], arguments.repeats, second_start=not arguments.quick
    )
    record = {"entry": "training", "machine": machine(argv, "training"), "rows": [row]}
    report([training_table([row])], record, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
