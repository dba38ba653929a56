"""Trainings of a sweep against the same ones alone: `python -m tests.sweep_equality SPEC` with four CPU devices.

A process of its own, since the number of devices cannot change later. Exits with the first difference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from jaxroute.config.build import build_trainer
from jaxroute.sweeps.plan import Row, make_groups
from jaxroute.sweeps.program import Program
from jaxroute.sweeps.spec import load_spec

ROWS = [Row(0, 0), Row(2, 0), Row(5, 5), Row(4, 0), Row(1, 5), Row(0, 5)]  # trial 2 diverges


def main(path: Path) -> None:
    (group,), _ = make_groups(load_spec(path))
    trainer = build_trainer(group.experiment)
    alone = []
    for trial, seed in ROWS:
        inputs = group.inputs[trial]
        state = trainer.init(jax.random.key(seed), inputs.training_params, inputs.hyperparameters)
        state, metrics = trainer.train_chunk(state, inputs.training_params, inputs.hyperparameters)
        alone.append((jax.device_get(state.learner.params), metrics))

    assert len(jax.devices()) == 4
    for devices, size, vmapped in ((jax.devices(), 8, True), (jax.devices()[:1], 6, False)):
        program = Program(group, len(ROWS), devices, vmapped)
        inputs = program.inputs(ROWS)
        states, metrics = program.train_chunk(program.init(ROWS, inputs), inputs)
        assert program.size == size and {shard.device for shard in states.returns.addressable_shards} == set(devices)
        assert states.learner.updates.tolist() == [20] * size
        assert np.isnan(metrics["mean_q"][:6]).tolist() == [trial == 2 for trial, _ in ROWS]
        for index, (params, own) in enumerate(alone):
            np.testing.assert_allclose(metrics["reward"][index], own["reward"], rtol=1e-4)
            if ROWS[index].trial != 2:
                ours = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), states.learner.params)
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, params)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
        assert 3 * held < program.bytes_needed() < 100 * held


if __name__ == "__main__":
    main(Path(sys.argv[1]))
