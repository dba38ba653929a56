"""The JAX engine equals vLLM's own scheduler on its recorded schedules, both ways of advancing, in both precisions."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxroute.replay import main
from tests.replaying import Batch

FOLDER = Path(__file__).parent / "data" / "vllm_schedules"
FILES = sorted(FOLDER.glob("*.json"))
SCHEDULES = [json.loads(path.read_text()) for path in FILES]
MOST_REQUESTS = max(len(schedule["requests"]) for schedule in SCHEDULES)
MOST_ITERATIONS = max(schedule["summary"]["iterations"] for schedule in SCHEDULES)
DECIDED = ("sched", "np", "nd", "ctx", "preempted", "waiting", "used_blocks")
REQUEST_FIELDS = ("first_token_time", "finish_time", "preemptions", "emitted")


def run(way: str, x64: bool) -> list[dict]:
    with jax.enable_x64(x64):
        batch = Batch(SCHEDULES, MOST_REQUESTS)
        return batch.by_jumps() if way == "jumps" else batch.by_iterations(MOST_ITERATIONS)


@pytest.fixture(scope="module", params=[("jumps", True), ("jumps", False), ("iterations", True), ("iterations", False)])
def results(request) -> tuple[list[dict], bool]:
    way, x64 = request.param
    return run(way, x64), x64


def test_the_files_are_all_there():
    assert len(FILES) == 15


@pytest.mark.parametrize("index", range(len(FILES)), ids=[path.stem for path in FILES])
def test_schedule(results, index):
    got, exact = results[0][index], results[1]
    wanted = SCHEDULES[index]
    same = (lambda value: value) if exact else (lambda value: pytest.approx(value, rel=1e-4, abs=0))
    assert got["status"] == wanted["status"]
    assert got["summary"]["iterations"] == wanted["summary"]["iterations"]
    assert got["summary"]["preemptions"] == wanted["summary"]["preemptions"]
    assert got["summary"]["end_time"] == same(wanted["summary"]["end_time"])
    for identifier, request in wanted["per_request"].items():
        for field in REQUEST_FIELDS:
            value = request[field]
            assert got["per_request"][identifier][field] == (value if value is None else same(value)), identifier
    if wanted["iterations"] is not None:
        for total in ("np", "nd", "ctx"):
            assert got["totals"][total] == sum(record[total] for record in wanted["iterations"])
    if "iterations" in got and wanted["iterations"] is not None:
        for record, wanted_record in zip(got["iterations"], wanted["iterations"], strict=True):
            assert record == {field: wanted_record[field] for field in DECIDED}
            assert list(record["sched"]) == list(wanted_record["sched"]), "order of scheduling"


def test_replay_command_equals_the_stalled_schedule(tmp_path):
    path = FOLDER / "g14_kv_too_long_stall.json"
    wanted = json.loads(path.read_text())
    out = tmp_path / "out.json"
    with jax.enable_x64(True):
        assert main([str(path), "--out", str(out)]) == 0
    got = json.loads(out.read_text())
    assert got["status"] == "stalled"
    assert got["summary"] == {key: wanted["summary"][key] for key in ("iterations", "preemptions", "end_time")}
    assert got["per_request"] == {
        identifier: {field: request[field] for field in REQUEST_FIELDS}
        for identifier, request in wanted["per_request"].items()
    }
