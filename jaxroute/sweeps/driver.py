"""Runs a sweep: rung by rung and batch by batch, only the batches without results."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from rich.console import Console

from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.display import SweepDisplay
from jaxroute.sweeps.plan import Batch, Group, make_batches
from jaxroute.sweeps.program import Program, trials_that_fit
from jaxroute.sweeps.ranking import survivors
from jaxroute.sweeps.results import SweepFolder
from jaxroute.sweeps.runner import forget_batch, forget_rung, run_batch
from jaxroute.sweeps.spec import Spec

Execute = Callable[[Sequence[Batch], SweepDisplay], Iterator[tuple[Batch, dict[str, Any]]]]
"""Runs batches of a rung, and yields each batch with its part of the results."""


def choose_sizes(spec: Spec, groups: list[Group], given: int | None, devices: Sequence[Any]) -> dict[str, int]:
    """Number of trainings of each group per batch, and number of devices; `given` overrides the number that fits."""
    sizes = {"devices": len(devices)}
    for group in groups:
        trainings = len(group.inputs) * len(spec.seeds)
        sizes[str(group.number)] = min(given, trainings) if given else trials_that_fit(group, trainings, devices)
    return sizes


def run_missing_batches(
    spec: Spec, groups: list[Group], folder: SweepFolder, sizes: dict[str, int], execute: Execute, console: Console
) -> None:
    """Runs the batches without results in `folder`, and writes their results there. Raises the errors of `execute`."""
    trials = [trial.number for trial in spec.trials]
    per_batch = {group.number: sizes[str(group.number)] for group in groups}
    with SweepDisplay(console, spec) as display:
        for rung in range(len(spec.rungs)):
            batches = make_batches(spec, groups, rung, trials, per_batch)
            missing = []
            for batch in batches:
                if folder.finished(batch):
                    forget_batch(batch, folder.work)  # left if the process was killed after writing the results
                    display.finished(batch, folder.rows(), earlier=True)
                else:
                    missing.append(batch)
            for batch, part in execute(missing, display):
                folder.finish(batch, part)
                forget_batch(batch, folder.work)
                display.finished(batch, folder.rows())
            if rung:
                forget_rung(rung - 1, folder.work)
            trials = survivors(folder.rows(), rung, spec.keep)
    folder.write_table()


def execute_here(spec: Spec, groups: list[Group], sizes: dict[str, int], folder: SweepFolder, stop: Stop) -> Execute:
    """Runs batches one after another on the devices of this machine."""

    key, program = None, None

    def execute(batches: Sequence[Batch], display: SweepDisplay) -> Iterator[tuple[Batch, dict[str, Any]]]:
        nonlocal key, program
        for batch in batches:
            # One program at a time, because each uses memory.
            if program is None or key != (batch.group, batch.size):
                key = batch.group, batch.size
                program = Program(groups[batch.group], batch.size, jax.local_devices()[: sizes["devices"]])
            yield batch, run_batch(spec, program, batch, folder.work, stop, partial(display.chunk_done, batch))

    return execute
