"""A tiny suite, and the command on it in a process of its own: `python -m tests.suiting [POINT SIGNAL] ARGUMENT ...`.

Its environments differ only in their rate, and its trainings and sets of episodes only in numbers, so that they share
what is compiled.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from jaxroute.commands import suite as command
from jaxroute.suites.description import SUITES, Episodes, Suite
from tests.killing import Point, meet

TRAINING = (
    "training.frames=200",
    "training.num_envs=4",
    "training.buffer_capacity=400",
    "training.batch_size=16",
    "training.steps_per_chunk=25",
    "training.checkpoint_seconds=0",
    "training.validation_decisions=0",
    "agent.warmup_frames=100",
    "environment.penalty=off",
    "network.kind=flat",
    "network.mlp=[8]",
)
TINY = Suite(
    name="tiny",
    environments=("paper-3", "overload-3"),
    trained={"trained": TRAINING, "baseline_rl": (*TRAINING, "agent.gamma=0.5")},
    seeds=(0, 4),
    decisions=1200,
    index_rule="index_rule",
    rules=("shortest_queue", "round_robin"),
    rule_decisions=1200,
    ceiling="shortest_queue",
    selection=Episodes(3, 30, 20),
    evaluation=Episodes(3, 30, 10),
    short=Episodes(3, 30, 30),
    engine="vllm-0.19",
    untuned=("random",),
)
POINTS = {
    "a part half written": Point("before", "jaxroute.files:os.replace", 8),  # after those of the folder and the rules
    "within a training": Point("after", "jaxroute.runs.training_state:TrainingStates.offer", 2),
    "half a report": Point("before", "jaxroute.suites.report:leads_picture"),
}


def parts(folder: Path) -> dict[str, Any]:
    """What is finished, without times."""
    found = {}
    for path in sorted((folder / "parts").rglob("*.json")):
        part = json.loads(path.read_text())
        assert part.pop("seconds") >= 0
        found[f"{path.parent.name}/{path.stem}"] = part
    return found


def main(*arguments: str) -> int:
    SUITES["tiny"] = TINY
    if arguments[0] in POINTS:
        name, number, *rest = arguments
        meet(POINTS[name], signal.Signals[number])
        return command.main(rest)
    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
