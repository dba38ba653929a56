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

POINTS = TRAINING | SWEEP | {"a chunk of a batch": Point("before", "jaxroute.sweeps.display:SweepDisplay.chunk_done")}


def main(name: str, number: str, command: str, *arguments: str) -> int:
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


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
