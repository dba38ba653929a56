"""The plain Python references equal vLLM's own recorded schedules, V1's and V0's, field by field and bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference import caching
from tests.reference.cases import MAX_OUTPUT, MAX_PROMPT, MAX_REQUESTS, random_case
from tests.reference.engine import ENGINES, duration, simulate

FOLDER = Path(__file__).parent / "data" / "vllm_schedules"
SCHEDULES = sorted(FOLDER.glob("*.json"))
V0_SCHEDULES = sorted((FOLDER / "v0").glob("*.json"))
V033_SCHEDULES = sorted((FOLDER / "v033").glob("*.json"))


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def test_all_schedules_are_here():
    assert len(SCHEDULES) == 15 and len(V0_SCHEDULES) == 9 and len(V033_SCHEDULES) == 26


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_equals_recorded_vllm_schedule(path: Path):
    recorded = json.loads(path.read_text())
    ours = simulate(recorded)
    for key in ("status", "usable_blocks", "summary"):
        assert ours[key] == recorded[key]
    # `finish_reason` is vLLM's name for "output length reached", the only way in which these requests end.
    assert ours["per_request"] == {id: without(r, "finish_reason") for id, r in recorded["per_request"].items()}
    if recorded["iterations"] is not None:
        assert ours["iterations"] == recorded["iterations"]
        orders = [list(record["sched"]) for record in ours["iterations"]]  # dict equality ignores the order
        assert orders == [list(record["sched"]) for record in recorded["iterations"]]


@pytest.mark.parametrize("path", V0_SCHEDULES, ids=lambda path: path.stem)
def test_equals_recorded_vllm_v0_schedule(path: Path):
    recorded = json.loads(path.read_text())
    ours = simulate(recorded)
    assert ours == {key: recorded[key] for key in ours}
    assert recorded.keys() - ours.keys() == {"vllm_version", "engine", "config", "requests"}
    for record, wanted in zip(ours["iterations"], recorded["iterations"], strict=True):
        assert list(record["sched"]) == list(wanted["sched"]), "order of scheduling"


@pytest.mark.parametrize("path", V033_SCHEDULES, ids=lambda path: path.stem)
def test_equals_recorded_schedule_of_vllm_033(path: Path):
    recorded = json.loads(path.read_text())
    ours = caching.simulate(recorded)
    for key in ("status", "usable_blocks", "summary"):
        assert ours[key] == recorded[key]
    assert ours["per_request"] == {id: without(r, "finish_reason") for id, r in recorded["per_request"].items()}
    if recorded["iterations"] is None:
        keys = ("np", "nd", "ctx", "used_blocks", "evicted", "preempted", "running", "waiting")
        rows = [{**record, "preempted": len(record["preempted"])} for record in ours["iterations"]]
        assert [[row[key] for key in keys] for row in rows] == recorded["compact"]
        return
    for record, wanted in zip(ours["iterations"], recorded["iterations"], strict=True):
        assert record == wanted
        assert list(record["sched"]) == list(wanted["sched"]), "order of scheduling"


def test_without_caching_and_asynchronous_scheduling_it_is_the_older_engine():
    rng = np.random.default_rng(5)
    for _ in range(100):
        spec = random_case(rng)
        older, ours = simulate(spec), caching.simulate(spec)
        assert (older["status"], older["usable_blocks"]) == (ours["status"], ours["usable_blocks"])
        for record, wanted in zip(ours["iterations"], older["iterations"], strict=True):
            assert wanted.items() <= record.items()
        for identifier, request in older["per_request"].items():
            assert request.items() <= ours["per_request"][identifier].items()
        assert older["summary"].items() <= ours["summary"].items()


def test_defaults_are_those_of_the_first_schedule():
    recorded = json.loads(SCHEDULES[0].read_text())
    assert simulate({"requests": recorded["requests"]})["summary"] == recorded["summary"]


def test_latency_knee():
    assert duration([1.0, 0.5, 0.25, 0.125], 4, 3, 8) == 1.0 + 2.0 + 0.75 + 1.0
    assert duration([1.0, 0.5, 0.25, 0.125, 5, 2.0], 4, 3, 8) == 4.75 + 2.0 * 2
    assert duration([1.0, 0.5, 0.25, 0.125, 9, 2.0], 4, 3, 8) == 4.75


@pytest.mark.parametrize("engine", ENGINES)
def test_random_cases_conserve_blocks_and_tokens(engine):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        spec = random_case(rng, engine=engine)
        result = simulate(spec)
        seen.add(result["status"])
        assert 1 <= len(spec["requests"]) <= MAX_REQUESTS
        limit = spec["config"]["max_model_len"] + (engine == "V0")
        for request, outcome in zip(spec["requests"], result["per_request"].values(), strict=True):
            assert 1 <= request["prompt_len"] <= MAX_PROMPT and 1 <= request["output_len"] <= MAX_OUTPUT
            if outcome["finish_time"] is not None:
                assert outcome["emitted"] == min(request["output_len"], limit - request["prompt_len"])
        for record in result["iterations"]:
            assert record["used_blocks"] + record["free_blocks"] == result["usable_blocks"]
            if engine != "orca" and (engine == "V1" or record["np"]):
                assert sum(record["sched"].values()) <= spec["config"]["max_num_batched_tokens"]
            assert engine != "V0" or not (record["np"] and record["nd"])
            assert engine != "orca" or not record["preempted"]
            assert record["running"] <= spec["config"]["max_num_seqs"]
        if result["status"] == "ok":
            done = result["summary"]["finished"] + result["summary"].get("ignored", 0)
            assert done == len(spec["requests"])
            assert result["iterations"][-1]["used_blocks_end"] == 0
    assert seen >= {"ok", "stalled"}


def test_max_iterations_counts_executed_iterations():
    requests = [{"arrival_iteration": 7, "prompt_len": 3, "output_len": 4}]
    assert simulate({"config": {"max_iterations": 4}, "requests": requests})["status"] == "ok"
    result = simulate({"config": {"max_iterations": 3}, "requests": requests})
    assert (result["status"], result["summary"]["iterations"]) == ("max_iterations", 3)
    assert result["per_request"]["0"]["emitted"] == 3
    assert result["per_request"]["0"]["finish_time"] is None
