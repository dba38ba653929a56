"""CMA-ES, the search without gradients of tuning, training and calibration; a generation divided among the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms import CMA_ES
from jax.sharding import AxisType, PartitionSpec

EACH, ALL = PartitionSpec("device"), PartitionSpec()
"""Of an array's first axis: a device has its part of it, or all devices have all of it."""


class Search:
    """CMA-ES (arXiv 1604.00772, evosax's) for the point of lowest loss; it begins at `origin` + `scale` * N(0, 1).

    `origin` and `scale` are float64 [P]; a generation has `population` points. `ask` and `tell` take turns.
    """

    def __init__(self, origin: np.ndarray, scale: np.ndarray, population: int, seed: int):
        self._origin, self._scale = origin, scale
        self._strategy = CMA_ES(population_size=population, solution=jnp.zeros(len(origin)))
        self._params = self._strategy.default_params
        self._key = jax.random.key(seed)
        self._state = self._strategy.init(self._key, jnp.zeros(len(origin)), self._params)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the next generation, float64 [P]."""
        return self._origin + self._scale * np.asarray(self._state.mean, np.float64)

    def ask(self) -> np.ndarray:
        """The points of a generation, float64 [population, P]."""
        self._key, ask, self._tell_key = jax.random.split(self._key, 3)
        self._steps, self._state = self._strategy.ask(ask, self._state, self._params)
        return self._origin + self._scale * np.asarray(self._steps, np.float64)

    def tell(self, losses: np.ndarray) -> None:
        """Moves the search by the losses, float [population], of the points that `ask` returned."""
        told = self._strategy.tell(self._tell_key, self._steps, jnp.asarray(losses), self._state, self._params)
        self._state = told[0]


def devices_for(lanes: int) -> int:
    """The largest number of devices that `lanes` divide evenly among."""
    return max(count for count in range(1, jax.device_count() + 1) if lanes % count == 0)


def over_devices(run: Callable[..., Any], devices: int, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`run` with its lanes divided among `devices`; `inputs` and `outputs` say which axes these are, as EACH or ALL."""
    if devices == 1:
        return run
    mesh = jax.make_mesh((devices,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
