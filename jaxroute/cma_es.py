"""CMA-ES, the search without gradients that tuning and calibration use."""

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms import CMA_ES


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
