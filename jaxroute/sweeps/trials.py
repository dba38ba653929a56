"""A sweep from within a program that chooses the settings itself, such as a search by another library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxroute.config.loader import change_config
from jaxroute.config.schema import Config
from jaxroute.console import report_console
from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.driver import choose_sizes, execute_here, run_missing_batches
from jaxroute.sweeps.plan import make_groups
from jaxroute.sweeps.ranking import ranking
from jaxroute.sweeps.results import SweepFolder
from jaxroute.sweeps.spec import Spec, Trial, check_keys


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
