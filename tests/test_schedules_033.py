"""The JAX engine equals vLLM 0.33's scheduler on its recorded schedules with prefix caching, asynchronous scheduling or
both, both ways of advancing, in both precisions. `replay` equals all of its recordings.
"""

from __future__ import annotations

import json

import jax
import pytest

from jaxroute.simulator.replay import replay
from tests.test_schedules import FOLDER, REQUEST_FIELDS, WAYS, assert_equal, run

pytestmark = pytest.mark.usefixtures("optimised_programs")

GROUPS = {
    "prefix caching": ("p05", "p12", "p14", "p16", "p24"),
    "asynchronous scheduling": ("a01", "a02", "a03", "a04", "a05", "a06", "a15"),
    "both": ("a10",),
}
"""Files by their options, each group one program. Their prompts share nothing."""

COMPACT = ("np", "nd", "ctx", "used_blocks", None, "preempted", None, "waiting")
"""What the numbers of a compact record are, as far as they are compared."""


def load(name: str) -> dict:
    (path,) = (FOLDER / "v033").glob(f"{name}_*.json")
    return json.loads(path.read_text())


SCHEDULES = {name: load(name) for names in GROUPS.values() for name in names}


@pytest.fixture(scope="module", params=WAYS)
def results(request) -> tuple[dict[str, dict], bool]:
    way, x64 = request.param
    found = {}
    for names in GROUPS.values():
        found |= zip(names, run([SCHEDULES[name] for name in names], way, x64), strict=True)
    return found, x64


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(results, name):
    got, wanted = results[0][name], SCHEDULES[name]
    assert_equal(got, wanted, REQUEST_FIELDS, results[1])
    if wanted["iterations"] is None and "iterations" in got:
        for record, compact in zip(got["iterations"], wanted["compact"], strict=True):
            record = {**record, "preempted": len(record["preempted"])}
            numbers = {key: number for key, number in zip(COMPACT, compact, strict=True) if key}
            assert numbers.items() <= record.items()


@pytest.mark.parametrize("path", sorted((FOLDER / "v033").glob("*.json")), ids=lambda path: path.stem)
def test_replay_equals_every_recording(path):
    """Also those whose prompts share segments: the engine runs block by block if prefix caching is on."""
    recorded = json.loads(path.read_text())
    cached = {"cached_tokens": "cached_total"} if recorded["config"]["enable_prefix_caching"] else {}
    with jax.enable_x64(True):
        got = replay(recorded)
    assert got["status"] == recorded["status"]
    assert got["summary"] == {key: recorded["summary"][key] for key in got["summary"]}
    fields = {field: field for field in REQUEST_FIELDS} | cached
    assert got["per_request"] == {
        identifier: {ours: request[theirs] for ours, theirs in fields.items()}
        for identifier, request in recorded["per_request"].items()
    }
