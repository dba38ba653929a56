"""What the tests of the adapters share."""

from __future__ import annotations

import copy
import os
import pickle

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

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
    """Nested dicts, lists and arrays, with their types; what gymnasium's masks say is absent does not count."""
    assert type(one) is type(other) or isinstance(one, dict)
    if isinstance(one, dict):
        for name in one.keys() - other.keys():
            assert not np.any(one.get(f"_{name}", one[name])), name
        for name in one.keys() & other.keys():
            equal(one[name], other[name])
    elif isinstance(one, list | tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        for a, b in zip(one, other, strict=True):
            equal(a, b)
    elif one is not None:
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


ACTIONS = st.tuples(
    st.lists(st.integers(0, EPISODE), min_size=2, max_size=2), st.sampled_from([np.int64, np.int32, np.int8, np.uint8])
).map(lambda drawn: np.array(drawn[0], drawn[1]))
"""Of two environments; the last is not one of theirs, which is a drop."""


class Calls(RuleBasedStateMachine):
    """Random calls of `ours` and of `theirs`, which must answer alike; subclasses have both, and the calls."""

    count = 0
    ours = theirs = None

    def both(self, call):
        """Whether `call`, of ours and of theirs, succeeded. Answers are written over, as they are the caller's."""
        type(self).count += 1
        answers = []
        for env in (self.theirs, self.ours):
            try:
                answers.append((None, call(env)))
            except Exception as error:
                answers.append((type(error), None))
        equal(answers[1][1], answers[0][1])
        assert answers[0][0] == answers[1][0]
        jax.tree.map(lambda leaf: leaf.fill(7) if isinstance(leaf, np.ndarray) else None, answers[1][1])
        return answers[0][0] is None

    @rule(how=st.sampled_from([copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))]))
    def go_on_with_a_copy(self, how):
        self.ours = how(self.ours)


def call_at_random(machine):
    """Runs the `Calls`: some hundred, or JAXROUTE_CALLS of them."""
    machine.count, steps = 0, 50
    examples = -(-int(os.environ.get("JAXROUTE_CALLS", 300)) // steps)
    while machine.count < examples * steps * 0.7:
        settings = hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        run_state_machine_as_test(machine, settings=settings)
    print(f"{machine.count} calls without a difference")
