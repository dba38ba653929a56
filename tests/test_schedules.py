"""The JAX engine equals vLLM's V1 and V0 schedulers on their recorded schedules, both ways of advancing; V1's in both
precisions.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxroute.commands.replay import main
from tests.replaying import Batch

pytestmark = pytest.mark.usefixtures("optimised_programs")

FOLDER = Path(__file__).parent / "data" / "vllm_schedules"
FILES = sorted(FOLDER.glob("*.json"))
V0_FILES = sorted((FOLDER / "v0").glob("*.json"))
SCHEDULES = [json.loads(path.read_text()) for path in FILES]
V0_SCHEDULES = [json.loads(path.read_text()) for path in V0_FILES]
MOST_REQUESTS = max(len(schedule["requests"]) for schedule in SCHEDULES)
DECIDED = ("sched", "np", "nd", "ctx", "preempted", "waiting", "used_blocks")
REQUEST_FIELDS = ("first_token_time", "finish_time", "preemptions", "emitted")
V0_FIELDS = ("ignored_iter", "finish_reason")
WAYS = [("jumps", True), ("jumps", False), ("iterations", True), ("iterations", False)]


def run(schedules: list[dict], way: str, x64: bool) -> list[dict]:
    with jax.enable_x64(x64):
        batch = Batch(schedules, max(len(schedule["requests"]) for schedule in schedules))
        most_iterations = max(schedule["summary"]["iterations"] for schedule in schedules)
        return batch.by_jumps() if way == "jumps" else batch.by_iterations(most_iterations)


@pytest.fixture(scope="module", params=WAYS)
def results(request) -> tuple[list[dict], bool]:
    way, x64 = request.param
    return run(SCHEDULES, way, x64), x64


@pytest.fixture(scope="module", params=[way for way in WAYS if way[1]])
def v0_results(request) -> tuple[list[dict], bool]:
    way, x64 = request.param
    return run(V0_SCHEDULES, way, x64), x64


def test_the_files_are_all_there():
    assert len(FILES) == 15 and len(V0_FILES) == 9


@pytest.mark.parametrize("index", range(len(FILES)), ids=[path.stem for path in FILES])
def test_schedule(results, index):
    assert_equal(results[0][index], SCHEDULES[index], REQUEST_FIELDS, results[1])


@pytest.mark.parametrize("index", range(len(V0_FILES)), ids=[path.stem for path in V0_FILES])
def test_v0_schedule(v0_results, index):
    assert_equal(v0_results[0][index], V0_SCHEDULES[index], REQUEST_FIELDS + V0_FIELDS, v0_results[1])


def assert_equal(got: dict, wanted: dict, request_fields: tuple[str, ...], exact: bool) -> None:
    same = (lambda value: value) if exact else (lambda value: pytest.approx(value, rel=1e-4, abs=0))
    assert got["status"] == wanted["status"]
    assert got["summary"]["iterations"] == wanted["summary"]["iterations"]
    assert got["summary"]["preemptions"] == wanted["summary"]["preemptions"]
    assert got["summary"]["end_time"] == same(wanted["summary"]["end_time"])
    for identifier, request in wanted["per_request"].items():
        for field in request_fields:
            value = request[field]
            number = isinstance(value, int | float)
            assert got["per_request"][identifier][field] == (same(value) if number else value), identifier
    if wanted["iterations"] is not None:
        for total in ("np", "nd", "ctx"):
            assert got["totals"][total] == sum(record[total] for record in wanted["iterations"])
    if "iterations" in got and wanted["iterations"] is not None:
        for record, wanted_record in zip(got["iterations"], wanted["iterations"], strict=True):
            assert record == {field: wanted_record[field] for field in DECIDED}
            assert list(record["sched"]) == list(wanted_record["sched"]), "order of scheduling"


@pytest.mark.parametrize(
    ("name", "status", "fields"),
    [
        ("g14_kv_too_long_stall.json", "stalled", REQUEST_FIELDS),
        ("v0/v11_ignored.json", "ok", REQUEST_FIELDS + V0_FIELDS),
    ],
)
def test_replay_command_takes_a_schedule_file_by_its_engine(tmp_path, name, status, fields):
    path = FOLDER / name
    wanted = json.loads(path.read_text())
    out = tmp_path / "out.json"
    with jax.enable_x64(True):
        assert main([str(path), "--out", str(out)]) == 0
    got = json.loads(out.read_text())
    assert got["status"] == wanted["status"] == status
    assert got["summary"] == {key: wanted["summary"][key] for key in ("iterations", "preemptions", "end_time")}
    assert got["per_request"] == {
        identifier: {field: request[field] for field in fields} for identifier, request in wanted["per_request"].items()
    }
