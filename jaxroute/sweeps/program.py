"""A batch of trainings as one compiled program on one or more devices, and the batch size that fits into memory."""

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxroute.agent.trainer import TRAIN_STATE_AXES, policy_router
from jaxroute.config.build import build_trainer
from jaxroute.evaluation.episodes import run_episodes
from jaxroute.sweeps.plan import Group, Row

USABLE = 0.8  # share of the free memory
LARGEST_ON_CPU = 16  # trainings per batch: larger batches are not faster there (benchmarks/results.md)


class Program:
    """Trains and evaluates batches of `size` trainings of a group.

    Trainings are independent: `jax.shard_map` divides the batch evenly among the devices, and the part of a device is
    `jax.vmap` over seeds and varied inputs, without communication. On a CPU core, `jax.vmap` is slower than one
    training after the other (benchmarks/results.md), so `jax.lax.map` is used.
    """

    def __init__(self, group: Group, size: int, devices: Sequence[Any], vmapped: bool | None = None):
        """`size` is rounded up to a multiple of the number of `devices`, of which at most `size` are used; spare rows
        repeat the last training.

        `vmapped` overrides the choice between `jax.vmap` and `jax.lax.map`.
        """
        vmapped = devices[0].platform != "cpu" if vmapped is None else vmapped
        # Axes of the leaves of states: counters have none if a batch is vmapped (see TRAIN_STATE_AXES).
        self.state_axes = TRAIN_STATE_AXES if vmapped else jax.tree.map(lambda _: 0, TRAIN_STATE_AXES, is_leaf=_is_none)
        devices = devices[:size]
        self.size = -(-size // len(devices)) * len(devices)
        self._group, self._mesh = group, Mesh(np.array(devices), ("trials",))
        config, experiment = group.config, group.experiment
        sac = experiment.sac
        self.frames_per_chunk = sac.num_envs * sac.steps_per_chunk
        trainer = build_trainer(experiment)

        def init(keys: jax.Array, varied: list[jax.Array], shared: list[jax.Array]) -> Any:
            """One training after another: evaluation is short; as a batch it takes longer to compile than to run."""

            def one(row: tuple[jax.Array, list[jax.Array]]) -> Any:
                inputs = group.inputs_of(row[1], shared)
                return trainer.init(row[0], inputs.training_params, inputs.hyperparameters)

            states = jax.lax.map(one, (keys, varied))
            if not vmapped:
                return states
            buffer = dataclasses.replace(states.buffer, rows_added=states.buffer.rows_added[0])
            return dataclasses.replace(states, buffer=buffer, steps=states.steps[0])

        def train_chunk(states: Any, varied: list[jax.Array], shared: list[jax.Array]) -> Any:
            def one(row: tuple[Any, list[jax.Array]]) -> Any:
                state, varied = row
                inputs = group.inputs_of(varied, shared)
                state, metrics = trainer.train_chunk(state, inputs.training_params, inputs.hyperparameters)
                return state, {name: value for name, value in metrics.items() if name != "episode"}

            if not vmapped:
                return jax.lax.map(one, (states, varied))
            return jax.vmap(one, ((self.state_axes, 0),), (self.state_axes, 0))((states, varied))

        env = dataclasses.replace(experiment.env, penalty="off")  # part only of the reward, which is not reported

        def evaluate(params: Any, varied: list[jax.Array], shared: list[jax.Array]) -> dict[str, jax.Array]:
            keys = jax.random.split(jax.random.key(config.evaluation.seed), config.evaluation.episodes)

            def one(row: tuple[Any, list[jax.Array]]) -> dict[str, jax.Array]:
                params, varied = row
                router = policy_router(experiment.network, params)
                return run_episodes(env, [router], jnp.int32(0), keys, group.inputs_of(varied, shared).params)

            return jax.vmap(one)((params, varied)) if vmapped else jax.lax.map(one, (params, varied))

        self._rows, self._shared = (NamedSharding(self._mesh, PartitionSpec(*names)) for names in (["trials"], []))
        self._states = jax.tree.map(
            lambda axis: self._shared if axis is None else self._rows, self.state_axes, is_leaf=_is_none
        )
        inputs = self._rows, self._shared
        self._init = self._compiled(init, (self._rows, *inputs), self._states)
        self._train_chunk = self._compiled(
            train_chunk, (self._states, *inputs), (self._states, self._rows), donate_argnums=0
        )
        self._evaluate = self._compiled(evaluate, (self._rows, *inputs), self._rows)

    def inputs(self, rows: Sequence[Row]) -> tuple[list[jax.Array], list[jax.Array]]:
        """The varied inputs of a batch, each with a leading axis, and the shared inputs, on the devices."""
        varied, shared = self._group.stacked(self.filled(rows))
        return jax.device_put(varied, self._rows), jax.device_put(shared, self._shared)

    def init(self, rows: Sequence[Row], inputs: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        """The initial states of trainings; leaves have a leading axis according to `state_axes`."""
        keys = jax.vmap(jax.random.key)(np.array([row.seed for row in self.filled(rows)], np.uint32))
        return self._init(keys, *inputs)

    def restored(self, states: Any) -> Any:
        """Moves states of `size` trainings to the devices."""
        return jax.device_put(states, self._states)

    def train_chunk(self, states: Any, inputs: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        """Returns states after `frames_per_chunk` frames and `Trainer` metrics [size, ...]. Donates `states`."""
        return self._train_chunk(states, *inputs)

    def evaluate(self, states: Any, inputs: tuple[list[jax.Array], list[jax.Array]]) -> dict[str, jax.Array]:
        """Metrics of the policies on fresh episodes, [size, evaluation.episodes]; the same episodes for all."""
        return self._evaluate(states.learner.params, *inputs)

    @cached_property
    def state_shapes(self) -> Any:
        """Shapes and dtypes of the states."""
        rows = [Row(next(iter(self._group.inputs)), 0)] * self.size
        varied, shared = self._group.stacked(rows)
        return jax.eval_shape(self._init, jax.random.split(jax.random.key(0), self.size), varied, shared)

    def bytes_needed(self) -> int:
        """Bytes of memory while a chunk runs, on the device that needs most. Compiles the program.

        On a CPU, whose devices share one memory, it is the sum over devices, including the copies that are saved.
        """
        rows = [Row(next(iter(self._group.inputs)), 0)]
        memory = self._train_chunk.lower(self.state_shapes, *self.inputs(rows)).compile().memory_analysis()
        program = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        program -= memory.alias_size_in_bytes
        if self._mesh.devices[0].platform != "cpu":
            return program
        return program * self._mesh.size + 2 * _bytes(self.state_shapes)

    def _compiled(self, function: Any, inputs: Any, outputs: Any, **options: Any) -> Any:
        """`function`, with the shardings of its inputs and outputs."""
        specs, out_specs = jax.tree.map(lambda sharding: sharding.spec, (inputs, outputs))
        # The check of varying values would reject the loops inside, because they start from constants.
        sharded = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, in_shardings=inputs, **options)

    def filled(self, rows: Sequence[Row]) -> list[Row]:
        """Pads to `size` rows."""
        return [*rows, *[rows[-1]] * (self.size - len(rows))]


def trials_that_fit(group: Group, trainings: int, devices: Sequence[Any]) -> int:
    """Number of trainings of a group per batch: as many as fit into memory by the compiler's measurement."""
    free = _free_bytes(devices[0])
    size = min(trainings, LARGEST_ON_CPU) if devices[0].platform == "cpu" else trainings
    # Only the size of the states is known before compilation.
    size = min(size, max(1, int(USABLE * free / _bytes(Program(group, 1, devices[:1]).state_shapes))))
    while size > 1:
        needed = Program(group, size, devices).bytes_needed()
        if needed <= USABLE * free:
            break
        size = max(1, min(size - 1, int(size * USABLE * free / needed)))
    return size


def _is_none(axis: Any) -> bool:
    return axis is None


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _free_bytes(device: Any) -> int:
    """Bytes of memory that a device can use."""
    statistics = None if device.platform == "cpu" else device.memory_stats()
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(available.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
