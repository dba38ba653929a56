"""Decides which trainings share a program, and which run together."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxroute.agent.sac import Hyperparameters
from jaxroute.config.build import Experiment, build_experiment
from jaxroute.config.schema import Config
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.sweeps.spec import Spec, Trial


class Row(NamedTuple):
    """One training: a trial with a seed."""

    trial: int
    seed: int


class Inputs(NamedTuple):
    """The inputs of a training beside its seed, each a pytree of arrays."""

    training_params: EnvParams
    hyperparameters: Hyperparameters
    params: EnvParams  # for the evaluation


@dataclass(frozen=True)
class Group:
    """Trials that differ only in traced values, and therefore share one program."""

    number: int
    config: Config  # of the first trial
    experiment: Experiment  # of the first trial
    inputs: dict[int, Inputs]  # by number of the trial
    varied: tuple[bool, ...]  # whether each leaf of the inputs differs between the trials

    def stacked(self, rows: list[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The inputs of a batch of trainings: leaves that vary, each [rows, ...], and leaves that do not."""
        columns = list(zip(*(jax.tree.leaves(self.inputs[row.trial]) for row in rows), strict=True))
        varied = [np.stack(column) for column, varies in zip(columns, self.varied, strict=True) if varies]
        return varied, [column[0] for column, varies in zip(columns, self.varied, strict=True) if not varies]

    def inputs_of(self, varied: list[Any], shared: list[Any]) -> Inputs:
        """The inputs of one training from both kinds of leaves."""
        parts = {True: iter(varied), False: iter(shared)}
        structure = jax.tree.structure(next(iter(self.inputs.values())))
        return jax.tree.unflatten(structure, [next(parts[varies]) for varies in self.varied])


class Batch(NamedTuple):
    """Trainings that run together between two rungs."""

    rung: int
    number: int  # within the rung
    group: int
    rows: list[Row]
    size: int  # rows of the program; spare rows repeat the last training

    @property
    def name(self) -> str:
        """Of its files in the sweep's folder."""
        return f"rung{self.rung}-batch{self.number}"


def make_groups(spec: Spec) -> tuple[list[Group], list[str]]:
    """The groups of a spec in order of their first trials, and notes on the data.

    Raises `UserError` as `build_experiment`.
    """
    members: dict[Any, list[tuple[Trial, Experiment]]] = {}
    notes: dict[str, None] = {}
    for trial in spec.trials:
        try:
            experiment = build_experiment(trial.config)
        except UserError as error:
            raise UserError(f"trial {trial.number}, {trial.values}: {error}") from None
        notes.update(dict.fromkeys(experiment.notes))
        members.setdefault(_static(trial.config, experiment), []).append((trial, experiment))
    groups = []
    for number, trials in enumerate(members.values()):
        inputs = {trial.number: _inputs(experiment) for trial, experiment in trials}
        columns = zip(*(jax.tree.leaves(each) for each in inputs.values()), strict=True)
        varied = tuple(
            any(not np.array_equal(leaf, column[0], equal_nan=True) for leaf in column) for column in columns
        )
        groups.append(Group(number, trials[0][0].config, trials[0][1], inputs, varied))
    return groups, list(notes)


def make_batches(
    spec: Spec, groups: list[Group], rung: int, trials: list[int], per_batch: dict[int, int]
) -> list[Batch]:
    """The batches of `trials` at a rung. Each is of one group, and sizes are as equal as possible, at most `per_batch`.

    They depend only on the arguments, so that a resumed sweep has the same batches.
    """
    batches: list[Batch] = []
    for group in groups:
        rows = [Row(trial, seed) for trial in trials if trial in group.inputs for seed in spec.seeds]
        if rows:
            parts = -(-len(rows) // per_batch[group.number])
            size = -(-len(rows) // parts)
            for start in range(0, len(rows), size):
                batches.append(Batch(rung, len(batches), group.number, rows[start : start + size], size))
    return batches


def _inputs(experiment: Experiment) -> Inputs:
    inputs = Inputs(experiment.training_params, experiment.hyperparameters, experiment.params)
    return jax.tree.map(np.asarray, inputs)


def _static(config: Config, experiment: Experiment) -> Any:
    """Everything that a program depends on, as a hashable value."""
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(_inputs(experiment)))
    training, evaluation = config.training, config.evaluation
    return (
        (experiment.env, experiment.network, experiment.sac, jax.tree.structure(_inputs(experiment)), shapes),
        jax.tree.structure(experiment.params_axes),
        (training.frames, evaluation.episodes, evaluation.seed),
    )
