"""Property test: the three ways to run an engine agree on random cases (`make fuzz CASES=n` runs more of them)."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz import CHUNK, differences, sharing_differences
from tests.reference.cases import VARIANTS, cases, sharing_case

pytestmark = pytest.mark.usefixtures("optimised_programs")


@pytest.mark.parametrize("variant", VARIANTS)
@hypothesis.settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_jumps_iterations_and_reference_agree(variant, data):
    """3 batches of 100 cases (the first all of the simplest), each one vmapped program: only the first compiles."""
    specs = data.draw(st.lists(cases(variant), min_size=CHUNK, max_size=CHUNK))
    assert differences(specs) == []


def test_replay_with_shared_prefixes_and_reference_agree():
    rng = np.random.default_rng(0)
    assert sharing_differences([sharing_case(rng) for _ in range(300)]) == []
