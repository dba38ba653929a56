"""The time of a training in a sweep: seconds per training and chunk, for several numbers of trainings at a time,
relative to the same training alone, which is measured directly before.

The trials are the first ones of configs/sweep.yaml or SPEC. The first chunk, with compilation and warm-up, is not
counted: every timed chunk learns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.harness import Column, Parser, Row, count, machine, report, table
from jaxroute.config.build import build_trainer
from jaxroute.config.loader import config_folder
from jaxroute.drawing import INK, STYLE, TRAINED_COLOUR
from jaxroute.errors import UserError, command
from jaxroute.files import whole_file
from jaxroute.runs.devices import use_all_cores
from jaxroute.sweeps.plan import Group, make_groups
from jaxroute.sweeps.plan import Row as Training
from jaxroute.sweeps.program import Program
from jaxroute.sweeps.spec import load_spec

COLUMNS = (
    Column("trainings", "at a time"),
    Column("compile_seconds", "compile, s", ".1f"),
    Column("seconds", "s a training and chunk", ".3f"),
    Column("alone", "alone, s", ".3f"),
    Column("ratio", "ratio", ".2f"),
    Column("frames_per_second", "frames/s in all"),
    Column("megabytes", "memory, MB", ",.0f"),
)


def timed(chunk: Callable[[Any], Any], state: Any, repeats: int) -> tuple[float, float]:
    """Median seconds of the timed chunks, and seconds of the first chunk, which compiles."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(chunk(state)[0])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), seconds[0]


def measure_sweep(group: Group, trainings: Sequence[Training], sizes: Sequence[int], repeats: int) -> list[Row]:
    trainer = build_trainer(group.experiment)
    inputs = group.inputs[trainings[0].trial]
    state = trainer.init(jax.random.key(trainings[0].seed), inputs.training_params, inputs.hyperparameters)

    def alone(state: Any) -> Any:
        return trainer.train_chunk(state, inputs.training_params, inputs.hyperparameters)

    alone(state)
    rows = []
    for size in sizes:
        state = trainer.init(jax.random.key(trainings[0].seed), inputs.training_params, inputs.hyperparameters)
        single, _ = timed(alone, state, repeats)
        program = Program(group, size, jax.local_devices())
        batch = [trainings[index % len(trainings)] for index in range(program.size)]
        own = program.inputs(batch)
        together, first = timed(
            lambda state, program=program, own=own: program.train_chunk(state, own), program.init(batch, own), repeats
        )
        rows.append(
            {
                "trainings": program.size,
                "compile_seconds": first - together,
                "seconds": together / program.size,
                "alone": single,
                "ratio": together / program.size / single,
                "frames_per_second": program.frames_per_chunk * program.size / together,
                "megabytes": program.bytes_needed() / 1e6,
            }
        )
    return rows


def picture(path: Path, device: str, rows: Sequence[Row]) -> None:
    """Writes a PNG of the ratio over the number of trainings at a time."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.8), layout="constrained")
        axes = figure.subplots()
        x, y = [row["trainings"] for row in rows], [row["ratio"] for row in rows]
        axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="the training alone")
        axes.plot(x, y, color=TRAINED_COLOUR, marker="o", linewidth=1.8)
        for at, ratio in zip(x, y, strict=True):
            axes.annotate(f"{ratio:.2f}", (at, ratio), (0, -15), textcoords="offset points", ha="center", fontsize=9)
        axes.set(xscale="log", xlabel="trainings at a time", ylabel="time per training, over alone", title=device)
        axes.set_xticks(x, [str(number) for number in x])
        axes.minorticks_off()
        axes.set_ylim(0, 1.2 * max(1.0, *y))
        axes.legend(loc="lower right")
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("sweep", __doc__)
    parser.add_argument("spec", nargs="?", type=Path, metavar="SPEC", help="YAML file (default: configs/sweep.yaml)")
    parser.add_argument("--at-a-time", nargs="+", type=count, default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write a PNG of the ratios to this file")
    parser.add_measuring()
    arguments = parser.read(argv)
    use_all_cores()
    spec = load_spec(arguments.spec or config_folder() / "sweep.yaml")
    groups, _ = make_groups(spec)
    if len(groups) > 1:
        raise UserError(f"{arguments.spec}: varies static keys; give a spec of one group")
    trainings = [Training(trial.number, seed) for trial in spec.trials for seed in spec.seeds]
    sizes = arguments.at_a_time[:2] if arguments.quick else arguments.at_a_time
    rows = measure_sweep(groups[0], trainings, sizes, arguments.repeats)
    frames = spec.trials[0].config.training
    chunk = f"chunks of {frames.num_envs} environments x {frames.steps_per_chunk} steps"
    record: dict[str, Any] = {"entry": "sweep", "machine": machine(argv, "sweep"), "rows": rows}
    if arguments.picture:
        picture(arguments.picture, f"{record['machine']['device']}, {jax.device_count()} devices", rows)
    report([table("sweep: seconds of a training", COLUMNS, rows, chunk)], record, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
