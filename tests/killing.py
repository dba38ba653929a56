"""A command that a signal meets at a named point: `python -m tests.killing NAME SIGNAL COMMAND [ARGUMENT ...]`.

The process sends the signal to itself, so that it always comes at that point. SIGKILL leaves on the disk what is
there: nothing is closed, flushed or removed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Point(NamedTuple):
    """Before or after the call number `count` of `function`, which is named as module:name, as its caller finds it."""

    when: Literal["before", "after"]
    function: str
    count: int = 1


TRAINING = {
    "a chunk trained": Point("before", "jaxroute.runs.metrics_log:MetricsLog.write"),
    "metrics half rewritten": Point("before", "jaxroute.files:os.replace"),
    "a chunk logged": Point("after", "jaxroute.runs.metrics_log:MetricsLog.write", 2),
    "a state half written": Point("after", "jaxroute.runs.checkpoint:ocp.PyTreeCheckpointHandler.save"),
    "a state without checksums": Point("before", "jaxroute.runs.checkpoint:write_text"),
    "a state whole": Point("after", "jaxroute.runs.checkpoint:write_text"),
    "an old state half removed": Point("before", "jaxroute.runs.training_state:shutil.rmtree"),
    "all trained": Point("before", "jaxroute.commands.train:save_checkpoint"),
    "a checkpoint": Point("after", "jaxroute.commands.train:save_checkpoint"),
    "a picture half written": Point("after", "jaxroute.drawing:Figure.savefig"),
    "finished but for the states": Point("before", "jaxroute.commands.train:remove_states"),
}
"""Of `jaxroute train`, which keeps one state and saves one after each chunk, in an order in which each is met when the
command goes on from where it was killed at the one before."""

SWEEP = {
    "a batch's state without checksums": Point("before", "jaxroute.runs.checkpoint:write_text"),
    "a training of the second batch": Point("after", "jaxroute.sweeps.runner:save_arrays", 4),
    "a batch evaluated": Point("before", "jaxroute.sweeps.results:SweepFolder.finish"),
    "the last results not in the table": Point("before", "jaxroute.sweeps.results:SweepFolder.write_table", 5),
    "a rung whose ends are left": Point("before", "jaxroute.sweeps.driver:forget_rung"),
    "all trained, no report": Point("before", "jaxroute.commands.sweep:write_report"),
    "half a report": Point("before", "jaxroute.sweeps.report:curves_picture"),
}
"""Of `jaxroute sweep` with four batches of three trainings and then two, likewise."""

WORKER = {
    "a batch's state without checksums": SWEEP["a batch's state without checksums"],
    "a batch's state whole": Point("after", "jaxroute.runs.checkpoint:write_text"),
    "the end of a training": Point("after", "jaxroute.sweeps.runner:save_arrays"),
}
"""Of the workers of `jaxroute sweep --ray`, each for one of them."""

POINTS = TRAINING | SWEEP | {"a chunk of a batch": Point("before", "jaxroute.sweeps.display:SweepDisplay.chunk_done")}


def main(name: str, number: str, command: str, *arguments: str) -> int:
    if name == "in its workers":
        from tests import killing  # by whose name a worker finds the function, which stands in `__main__` here

        importlib.import_module("jaxroute.sweeps.ray_cluster")._task = killing._task_that_dies
    else:
        meet(POINTS[name], signal.Signals[number])
    return importlib.import_module(f"jaxroute.commands.{command}").main(arguments)


def meet(point: Point, number: signal.Signals) -> None:
    """Makes this process send itself the signal when it comes to the point."""
    module, _, name = point.function.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    @functools.wraps(function)
    def met(*arguments: Any, **options: Any) -> Any:
        here = next(calls) == point.count
        if here and point.when == "before":
            os.kill(os.getpid(), number)
        result = function(*arguments, **options)
        if here and point.when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, met)


def _task_that_dies(spec: Any, group: Any, devices: int, batch: Any, work: Path) -> dict[str, Any]:
    """The task of a worker, which is killed at the first point of `WORKER` that none was killed at yet."""
    deaths = work.parents[1] / "deaths"
    deaths.mkdir(exist_ok=True)
    for name, point in WORKER.items():
        with suppress(FileExistsError):
            (deaths / name).touch(exist_ok=False)
            meet(point, signal.SIGKILL)
            break
    from jaxroute.sweeps import ray_cluster

    return ray_cluster._task(spec, group, devices, batch, work)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
