"""What the tests of the adapters share."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxroute
from jaxroute.adapters import host
from tests.rollouts import CHEAP_COMPILE

EPISODE = 4


def small(obs="flat", **options):
    """An environment that compiles fast, and its parameters."""
    return jaxroute.make("paper-3", slots=3, queue_nodes=1, episode_length=EPISODE, obs=obs, penalty="off", **options)


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """The adapters' programs, compiled in half the time."""
    names = ("_reset", "_step")
    before = {name: getattr(host, name) for name in names}
    for name in names:
        unjitted = before[name].__wrapped__
        setattr(host, name, jax.jit(unjitted, static_argnums=0, compiler_options=CHEAP_COMPILE))
    yield
    for name in names:
        setattr(host, name, before[name])


def equal(one, other):
    """Nested dicts and arrays; what gymnasium's masks say is absent does not count."""
    if isinstance(one, dict):
        for name in one.keys() - other.keys():
            assert not np.any(one.get(f"_{name}", one[name])), name
        for name in one.keys() & other.keys():
            equal(one[name], other[name])
    elif isinstance(one, np.ndarray) and one.dtype == object:
        for a, b in zip(one, other, strict=True):
            equal(a, b)
    elif one is None:
        assert other is None
    else:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
