"""Property test: the three ways to run an engine agree on random cases (`make fuzz CASES=n` runs more of them)."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st

from tests.fuzz import CHUNK, differences
from tests.reference.cases import cases


@hypothesis.settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.lists(cases(), min_size=CHUNK, max_size=CHUNK))
def test_jumps_iterations_and_reference_agree(specs):
    """3 batches of 100 cases (the first all of the simplest), each one vmapped program: only the first compiles."""
    assert differences(specs) == []
