"""The spec file of a sweep, and its trials."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import yaml

from jaxroute.config.loader import change_config, check_value, continuous_keys, dotted_keys, load_config, nearest_keys
from jaxroute.config.schema import Config, Count, Range, Seed, Whole
from jaxroute.errors import UserError
from jaxroute.files import read_yaml

Seeds = Annotated[
    tuple[Seed, ...], Range("a list of seeds, each once", lambda value: 0 < len(value) == len(set(value)))
]
Rungs = Annotated[
    tuple[Count, ...],
    Range("frames in rising order, such as [40000, 100000]", lambda rungs: sorted(set(rungs)) == list(rungs)),
]
Share = Annotated[float, Range("a number between 0 and 1, the share that continues", lambda keep: 0 < keep < 1)]
OPTIONS = {  # key -> type and default
    "samples": (Count, 1),
    "sampling_seed": (Whole, 0),
    "seeds": (Count | Seeds, [0]),
    "rungs": (Rungs, []),
    "keep": (Share, 0.5),
}
KEYS = ("config", "fixed", "parameters", *OPTIONS)
VALUES, RANGES = ("grid", "choice"), ("uniform", "log_uniform")
OWN_KEYS = {"training.seed": "the spec's seeds", "training.loggers": "each trial's metrics are in the results"}


class Trial(NamedTuple):
    """One setting of the varied keys."""

    number: int
    values: dict[str, Any]  # key -> value
    config: Config


@dataclass(frozen=True)
class Spec:
    """A sweep: every trial is trained with every seed."""

    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]
    rungs: tuple[int, ...]  # frames after which trials are evaluated; every rung but the last stops some of them
    keep: float  # share of the trials that continues after a rung
    text: str  # the file and its base configuration, which identify the results

    @property
    def keys(self) -> list[str]:
        """The varied keys."""
        return list(self.trials[0].values)


def load_spec(path: Path) -> Spec:
    """Reads and checks a spec (docs/sweeps.md has its keys).

    Raises:
        UserError: a file cannot be read, a key is unknown, a value is invalid, or nothing is varied.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values: {', '.join(KEYS)}")
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}; a spec has {', '.join(KEYS)}")
    samples, sampling_seed, seeds, rungs, keep = (
        check_value(tree.get(key, default), kind, f"{path}: {key}") for key, (kind, default) in OPTIONS.items()
    )
    given = tree.get("config")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{path}: config: expected the path of a configuration from the spec's folder; got {given!r}")
    base = load_config(path.parent / given if given else None)
    fixed = check_keys(tree.get("fixed") or {}, f"{path}: fixed")
    base = change_config(base, fixed, f"{path}: fixed")

    parameters = check_keys(tree.get("parameters") or {}, f"{path}: parameters")
    if not parameters:
        raise UserError(
            f"{path}: parameters: nothing is varied; give at least one key, such as agent.gamma: {{grid: [0.9, 0.95]}}"
        )
    kinds = {key: _kind(path, key, value) for key, value in parameters.items()}
    if samples > 1 and all(kind == "grid" for kind, _ in kinds.values()):
        raise UserError(f"{path}: samples: every key has a grid, so all samples would be equal; leave it out")
    chance = np.random.default_rng(sampling_seed)
    grids = [[(key, value) for value in values] for key, (kind, values) in kinds.items() if kind == "grid"]
    trials = []
    for point in itertools.product(*grids):
        for _ in range(samples):
            drawn = {key: _draw(chance, kind, values) for key, (kind, values) in kinds.items() if kind != "grid"}
            values = {key: (dict(point) | drawn)[key] for key in parameters}
            trials.append(Trial(len(trials), values, change_config(base, values, f"{path}: parameters")))

    frames = {trial.config.training.frames for trial in trials}
    if rungs and (len(frames) > 1 or rungs[-1] >= min(frames)):
        raise UserError(f"{path}: rungs: the last is training.frames, one for all trials; give only smaller ones")
    return Spec(
        trials=tuple(trials),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else seeds,  # 3 is [0, 1, 2]
        rungs=(*rungs, max(frames)),
        keep=keep,
        text=yaml.safe_dump([tree, [repr(trial.config) for trial in trials]], sort_keys=True),
    )


def check_keys(section: Any, source: str) -> dict[str, Any]:
    """`section`, if it is a mapping from keys that a sweep may set. A `UserError` begins with `source`."""
    if not isinstance(section, dict):
        raise UserError(f"{source}: expected keys of the configuration and values, got {section!r}")
    for key in section:
        if key in OWN_KEYS:
            raise UserError(f"{source}: {key} is not varied in a sweep: {OWN_KEYS[key]}")
        if key not in dotted_keys():
            raise UserError(
                f"{source}: unknown key {key}; nearest: {', '.join(nearest_keys(str(key), sections=False))}"
            )
    return section


def _kind(path: Path, key: str, value: Any) -> tuple[str, list[Any]]:
    """The kind of variation of a key, and its values or range."""
    where = f"{path}: parameters.{key}"
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in VALUES + RANGES:
        raise UserError(f"{where}: expected one of grid, choice, uniform or log_uniform and a list, got {value!r}")
    kind, values = next(iter(value.items()))
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {kind}: expected a list of one value or more, got {values!r}")
    if kind in VALUES:
        if any(value in values[:place] for place, value in enumerate(values)):
            raise UserError(f"{where}: {kind}: each value once, got {values!r}")
        return kind, values
    if key not in continuous_keys():
        raise UserError(
            f"{where}: {kind} draws any number, but this key is static or takes no number; list values under choice"
        )
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in values)
    if len(values) != 2 or not numbers or not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        above = " above 0" if kind == "log_uniform" else ""
        raise UserError(f"{where}: {kind}: expected two numbers{above}, the smaller first; got {values!r}")
    return kind, values


def _draw(chance: np.random.Generator, kind: str, values: list[Any]) -> Any:
    if kind == "choice":
        return values[chance.integers(len(values))]
    if kind == "uniform":
        return float(chance.uniform(*values))
    return float(math.exp(chance.uniform(math.log(values[0]), math.log(values[1]))))
