"""`jaxroute sweep SPEC.yaml`: trains with many settings and seeds at once, and writes the results into a folder."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxroute.console import print_notes, report_console
from jaxroute.errors import UserError, command
from jaxroute.runs.devices import use_all_cores
from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.display import best_table
from jaxroute.sweeps.driver import choose_sizes, execute_here, run_missing_batches
from jaxroute.sweeps.plan import make_groups
from jaxroute.sweeps.ray_cluster import check_ray, execute_on_ray
from jaxroute.sweeps.report import write_report
from jaxroute.sweeps.results import SweepFolder, ranking
from jaxroute.sweeps.spec import load_spec


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing of a sweep, then writes its table, pictures and report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute sweep",
        description="Train with many settings and seeds; trainings with equal shapes are one program. If the sweep was "
        "interrupted, the same command continues it.",
        epilog="docs/sweeps.md describes SPEC; configs/sweep.yaml is an example.",
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="YAML file with the keys to vary")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep (default: runs/sweep-NAME)")
    parser.add_argument(
        "--trials-per-batch", type=int, metavar="N", help="trainings at a time (default: as many as fit)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run batches as tasks of the Ray cluster at ADDRESS, or of a new one on this machine",
    )
    arguments = parser.parse_args(argv)
    if arguments.trials_per_batch is not None and arguments.trials_per_batch < 1:
        raise UserError(f"--trials-per-batch {arguments.trials_per_batch}: expected a whole number of 1 or more")
    spec = load_spec(arguments.spec)
    if arguments.ray:
        check_ray()
    use_all_cores()
    console = report_console()
    groups, notes = make_groups(spec)
    print_notes(console, notes)
    path = arguments.out or Path("runs") / f"sweep-{arguments.spec.stem}"
    folder = SweepFolder(path, spec)
    if not (path / "spec.yaml").is_file():
        shutil.copyfile(arguments.spec, path / "spec.yaml")

    begun = (path / "sizes.json").is_file()
    devices = jax.local_devices()
    if arguments.ray and devices[0].platform != "cpu":
        devices = devices[:1]  # like each task
    sizes = folder.sizes(lambda: choose_sizes(spec, groups, arguments.trials_per_batch, devices))
    if arguments.trials_per_batch and begun:
        print_notes(console, [f"{path} continues with the batch sizes of its first start (sizes.json)"])
    if sizes["devices"] > len(jax.local_devices()):
        raise UserError(
            f"{path}: was started on {sizes['devices']} devices, and there are {len(jax.local_devices())} here"
        )
    trainings = len(spec.trials) * len(spec.seeds)
    console.print(
        f"{len(spec.trials)} trials x {len(spec.seeds)} seeds = {trainings} trainings of {spec.rungs[-1]:,} frames, "
        f"{len(groups)} group{'s'[: len(groups) > 1]} of equal shapes, at most "
        f"{max(sizes[str(group.number)] for group in groups)} at a time on {sizes['devices']} "
        f"{devices[0].device_kind}, in {path}",
        highlight=False,
    )
    with Stop() as stop:
        if arguments.ray:
            execute = execute_on_ray(spec, groups, sizes["devices"], folder, arguments.ray, stop)
        else:
            execute = execute_here(spec, groups, sizes, folder, stop)
        run_missing_batches(spec, groups, folder, sizes, execute, console)
    shutil.rmtree(folder.work)
    rows = folder.rows()
    if not ranking(rows):
        raise UserError(f"{path}: every trial diverged; lower agent.critic_learning_rate")
    write_report(spec, folder)
    console.print(best_table(spec, rows))
    console.print(f"table, pictures and {path / 'best.yaml'} in {path}; read {path / 'report.md'}", highlight=False)
    return 0
