"""Runs a sweep: rung by rung and batch by batch, only the batches without results."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxroute.config.loader import change_config
from jaxroute.config.schema import Config
from jaxroute.console import report_console
from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.display import SweepDisplay
from jaxroute.sweeps.plan import Batch, Group, make_batches, make_groups
from jaxroute.sweeps.program import Program, trials_that_fit
from jaxroute.sweeps.results import SweepFolder, ranking, survivors
from jaxroute.sweeps.runner import forget_batch, forget_rung, run_batch
from jaxroute.sweeps.spec import Spec, Trial, check_keys

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

    @lru_cache(maxsize=1)  # one program at a time, because each uses memory
    def program(group: int, size: int) -> Program:
        return Program(groups[group], size, jax.local_devices()[: sizes["devices"]])

    def execute(batches: Sequence[Batch], display: SweepDisplay) -> Iterator[tuple[Batch, dict[str, Any]]]:
        for batch in batches:
            chunk_done = partial(display.chunk_done, batch)
            yield batch, run_batch(spec, program(batch.group, batch.size), batch, folder.work, stop, chunk_done)

    return execute


def train_trials(
    config: Config, settings: Sequence[dict[str, Any]], out: Path, seeds: Sequence[int] = (0,)
) -> list[float | None]:
    """Trains `config` with each of the `settings` ({"section.key": value}) and each seed, all at the same time.

    Returns for each setting the mean over the seeds of its policy's QoS per request on fresh episodes, or None where a
    training diverged. What a sweep leaves is in the folder `out`; the same call goes on where it was stopped.

    Raises:
        UserError: a key or value that cannot be, or a folder that holds something else.
    """
    trials = []
    for number, setting in enumerate(settings):
        source = f"trial {number}"
        values = check_keys(setting, source)
        trials.append(Trial(number, values, change_config(config, values, source)))
    frames = max(trial.config.training.frames for trial in trials)
    spec = Spec(tuple(trials), tuple(seeds), rungs=(frames,), keep=1.0, text=repr((trials, seeds)))
    groups, _ = make_groups(spec)
    folder = SweepFolder(out, spec)
    sizes = folder.sizes(lambda: choose_sizes(spec, groups, len(trials) * len(seeds), jax.local_devices()))
    with Stop() as stop:
        run_missing_batches(
            spec, groups, folder, sizes, execute_here(spec, groups, sizes, folder, stop), report_console()
        )
    qos = {trial.trial: trial.qos for trial in ranking(folder.rows())}
    return [qos.get(trial.number) for trial in trials]
