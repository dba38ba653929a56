"""The replay command: what it writes, and one clear line with exit code 2 for every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxroute.commands.replay import main
from jaxroute.errors import UserError
from jaxroute.simulator.catalogue import load_profile
from jaxroute.simulator.presets import PRESETS
from jaxroute.simulator.replay import load_spec, replay
from jaxroute.workload import load_trace
from tests.reference.engine import simulate
from tests.test_train import refused

PROFILE = "rtx4090-llama-3.1-8b"
GOOD = {"config": {}, "requests": [{"arrival_time": 0.0, "prompt_len": 3, "output_len": 2}]}


def run(tmp_path, text: str, name: str = "spec.json") -> tuple[int, dict | None]:
    spec, out = tmp_path / name, tmp_path / "out.json"
    spec.write_text(text)
    code = main([str(spec), "--out", str(out)])
    assert not list(tmp_path.glob("*.partial"))
    return code, json.loads(out.read_text()) if out.exists() else None


def test_csv_equals_json(tmp_path):
    requests = [
        {"arrival_time": t, "prompt_len": p, "output_len": o} for t, p, o in [(0.5, 5, 4), (0.75, 40, 2), (2, 1, 1)]
    ]
    lines = ["\ufeffarrival_time,prompt_len,output_len", *(",".join(map(str, r.values())) for r in requests)]
    code, got = run(tmp_path, "\n".join(lines), "requests.csv")
    assert code == 0
    assert got is not None and got["status"] == "ok"
    (read,) = got.pop("read")
    assert (read["format"], read["used"], read["span"]) == ("jaxroute", 3, 1.5)
    assert got == replay({"config": {}, "requests": requests})


def test_requests_keep_their_position_as_id_when_not_sorted(tmp_path):
    late, early = {"arrival_time": 2.0, "prompt_len": 3, "output_len": 2}, GOOD["requests"][0]
    per_request = replay({"config": {}, "requests": [late, early]})["per_request"]
    assert list(per_request) == ["0", "1"]
    assert per_request["0"]["first_token_time"] > 2.0 > per_request["1"]["first_token_time"]


def test_end_of_a_run_that_ends_before_all_have_joined():
    requests = [{"arrival_time": t, "prompt_len": 3, "output_len": 20} for t in (0.5, 100.0)]
    got = replay({"config": {"max_iterations": 5}, "requests": requests})
    wanted = simulate({"config": {"max_iterations": 5}, "requests": requests})
    assert got["status"] == wanted["status"] == "max_iterations" and got["summary"]["iterations"] == 5
    assert 0.5 < got["summary"]["end_time"] < 1
    assert got["summary"]["end_time"] == pytest.approx(wanted["summary"]["end_time"])
    assert got["per_request"]["1"]["first_token_time"] is None


def test_v0_without_a_config_is_vllm_06_on_a_gpu():
    """Output is processed asynchronously, so the engine runs once more when all is done; the watermark is 1 %."""
    requests = [{"arrival_time": 0.0, "prompt_len": 20, "output_len": 3}, {**GOOD["requests"][0], "prompt_len": 8193}]
    got = replay({"engine": "V0", "config": {"block_size": 1, "num_gpu_blocks": 8273}, "requests": requests})
    assert got["status"] == "ok" and got["summary"]["iterations"] == 4
    assert [r["finish_reason"] for r in got["per_request"].values()] == ["FINISHED_LENGTH_CAPPED", "FINISHED_IGNORED"]
    assert got["per_request"]["1"]["ignored_iter"] == 0
    assert got["per_request"]["0"]["finish_time"] < got["summary"]["end_time"]


def mooncake(path: Path, *rows: tuple[int, Any]) -> Path:
    """A trace of prompts of these numbers of tokens and hash_ids, 10 s apart."""
    records = [
        {"timestamp": 10_000 * index, "input_length": prompt, "output_length": 2, "hash_ids": ids}
        for index, (prompt, ids) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_hash_ids_say_what_prompts_share(tmp_path, capsys):
    """Each stands for 512 tokens, the last one for the rest, which is shared only by a prompt that has it whole."""
    trace = mooncake(tmp_path / "t.jsonl", (1200, [4, 5, 6]), (1300, [4, 5, 7]), (1200, [4, 5, 6]), (600, [8, 5]))
    out = tmp_path / "out.json"
    assert main([str(trace), "--engine", "vllm-0.33", "--out", str(out)]) == 0
    got = json.loads(out.read_text())
    assert [request["cached_tokens"] for request in got["per_request"].values()] == [0, 1024, 1184, 0]
    assert f"{2208 / 4300:.1%} of tokens cached" in capsys.readouterr().out
    assert main([str(trace), "--out", str(out)]) == 0
    assert "cached" not in capsys.readouterr().out and "cached_tokens" not in json.loads(out.read_text())["summary"]
    segments = [request["segments"] for request in load_spec(trace)["requests"]]
    assert segments[0] == [[4, 512], [5, 512], [6, 176]] and segments[3] == [[8, 512], [5, 88]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((1200, [1, 2]), "has 2 ids, and a prompt of 1200 tokens has 3, one for each 512"),
        ((1200, [1, 2, 3, 4]), "has 4 ids"),
        ((1200, [1, -2, 3]), "must be a list of whole numbers of 0 or more, is [1, -2, 3]"),
        ((1200, [1, 2.0, 3]), "must be a list of whole numbers"),
        ((1200, [1, True, 3]), "must be a list of whole numbers"),
        ((1200, "1 2 3"), "must be a list of whole numbers"),
    ],
)
def test_bad_hash_ids_are_one_clear_line(row, words, tmp_path, capsys):
    trace = mooncake(tmp_path / "t.jsonl", (100, [1]), row)
    line = refused(capsys, main, trace, "--engine", "vllm-0.33", "--out", tmp_path / "o.json")
    assert "t.jsonl, line 2: 'hash_ids'" in line and words in line and not (tmp_path / "o.json").exists()
    assert len(load_trace(trace).times) == 2, "what only needs times and lengths reads it"


def test_a_profile_under_a_version(tmp_path):
    """It keeps its hardware and its seats, and has the version's switches."""
    requests = tmp_path / "r.csv"
    requests.write_text("arrival_time,prompt_len,output_len\n0,400,30\n0.1,500,20\n")
    out, results = tmp_path / "out.json", {}
    for version in ("vllm-0.33", "vllm-0.19", "vllm-0.6"):
        assert main([str(requests), "--profile", PROFILE, "--engine", version, "--out", str(out)]) == 0
        results[version] = json.loads(out.read_text())
    profile = load_profile(PROFILE)["engine"]
    wanted = {**profile, **PRESETS["vllm-0.33"].switches}
    same = replay({"config": wanted, "requests": load_spec(requests)["requests"]})
    assert {key: results["vllm-0.33"][key] for key in same} == same
    assert "ignored_iter" in results["vllm-0.6"]["per_request"]["0"]
    own = tmp_path / "mine.yaml"
    engine = {"engine": "vllm-0.33", "gpu": "h100", "latency": profile["latency"], "num_gpu_blocks": 5000}
    own.write_text(yaml.safe_dump({"engine": engine}))
    options = load_profile(own)["engine"]
    assert options["enable_prefix_caching"] and options["max_num_seqs"] == 1024 and "engine" not in options
    for change, words in (
        ({"engine": "vllm-0.34"}, "unknown engine 'vllm-0.34'"),
        ({"engine": "vllm-0.6"}, "engine vllm-0.6 is no V1 engine"),
        ({"gpu": "h1"}, "unknown GPU 'h1'"),
    ):
        own.write_text(yaml.safe_dump({"engine": engine | change}))
        with pytest.raises(UserError, match=words):
            load_profile(own)


def test_a_gpu_is_for_an_engine(tmp_path, capsys):
    line = refused(capsys, main, mooncake(tmp_path / "t.jsonl", (9, [1])), "--gpu", "h100", "--out", "x.json")
    assert "--gpu: is for --engine" in line


def test_the_engine_of_a_version_has_its_defaults_and_the_config_comes_first():
    requests = [{"arrival_time": 0.0, "prompt_len": 40, "output_len": 3, "segments": [[1, 40]]}] * 2
    today = replay({"engine": "vllm-0.33", "gpu": "h100", "config": {}, "requests": requests})
    switches = {"enable_prefix_caching": True, "async_scheduling": True, "threshold_when_alone": False}
    assert today == replay({"config": switches, "requests": requests})
    assert today["summary"]["cached_tokens"] == 32 and today["per_request"]["0"]["cached_tokens"] == 0
    off = {"engine": "vllm-0.33", "config": {"enable_prefix_caching": False}, "requests": requests}
    assert "cached_tokens" not in replay(off)["summary"]
    older = {"engine": "vllm-0.6", "config": {}, "requests": requests[:1]}
    assert replay(older) == replay({**older, "engine": "V0"})


def test_orca_reserves_the_longest_sequence_and_stalls_without_room_for_one():
    requests = [{"arrival_time": 0.0, "prompt_len": 20, "output_len": 3}] * 3
    config = {"block_size": 16, "num_gpu_blocks": 2 * 512 + 1}
    got = [request["finish_time"] for request in replay(_orca(config, requests))["per_request"].values()]
    assert got[0] == got[1] < got[2]
    assert replay(_orca({**config, "num_gpu_blocks": 512}, requests))["status"] == "stalled"


def _orca(config: dict, requests: list[dict]) -> dict:
    return {"engine": "orca", "config": config, "requests": requests}


def spec(config: dict | None = None, engine: str = "V1", **request) -> str:
    return json.dumps({"engine": engine, "config": config or {}, "requests": [{**GOOD["requests"][0], **request}]})


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "spec.json", "the file is empty"),
        ('{"requests": [}', "spec.json", "line 1: not JSON"),
        ("{\n\n'requests': []\n}", "spec.json", "line 3: not JSON"),
        ("[]", "spec.json", "not a JSON object but []"),
        ('{"requests": {}}', "spec.json", "key requests: a list of requests is missing"),
        ('{"config": {}, "requests": []}\n{}', "spec.json", "holds 2 JSON objects"),
        ('{"requests": []}', "spec.json", "there is no request"),
        (spec(arrival_time=-1), "spec.json", "requests[0]: arrival_time"),
        (spec(arrival_time=float("nan")), "spec.json", "requests[0]: arrival_time"),
        (spec(prompt_len=0), "spec.json", "requests[0]: prompt_len"),
        (spec(output_len=1.5), "spec.json", "requests[0]: output_len"),
        (spec(arrival_iteration=3), "spec.json", "not both"),
        (spec({"max_num_seq": 4}), "spec.json", "max_num_seqs"),
        (spec(engine="vllm-0.34"), "spec.json", "key engine: unknown engine 'vllm-0.34'; the nearest are vllm-0.33"),
        ('{"gpu": "h100", "requests": [{}]}', "spec.json", "key gpu: it is for an engine of vllm-0.33, vllm-0.19"),
        ('{"engine": "vllm-0.33", "gpu": "h1", "requests": [{}]}', "spec.json", "key gpu: unknown GPU 'h1'"),
        (spec(engine="V2"), "spec.json", "key engine: unknown engine 'V2'; the nearest are V1, V0"),
        (
            spec({"max_num_batched_tokens": 512}, engine="V0"),
            "spec.json",
            "max_num_batched_tokens 512 is below max_mod",
        ),
        (spec({"watermark": 2}, engine="V0"), "spec.json", "watermark must be a number from 0"),
        (spec({"enable_chunked_prefill": True}, engine="V0"), "spec.json", "unknown engine option 'enable_chunked_"),
        (spec({"async_output_proc": 1}, engine="V0"), "spec.json", "async_output_proc must be true or false"),
        (spec({"watermark": 0.01}), "spec.json", "unknown engine option 'watermark'"),
        (spec({"enable_prefix_caching": 1}), "spec.json", "config: enable_prefix_caching must be true or false"),
        (
            spec({"enable_prefix_caching": True}, "V0"),
            "spec.json",
            "enable_prefix_caching is simulated for the V1 engine",
        ),
        (spec(segments=[[1, 2]]), "spec.json", "requests[0]: segments have 2 tokens, but prompt_len is 3"),
        (spec(segments=[[-1, 3]]), "spec.json", "requests[0]: segments must be a list of [id, tokens], whole numbers"),
        (spec(segments=[[1, 2, 3]]), "spec.json", "requests[0]: segments must be a list of [id, tokens]"),
        (spec(output_segment=-1), "spec.json", "requests[0]: output_segment must be a number from 0, not -1"),
        (spec(max_tokens=1), "spec.json", "requests[0]: max_tokens must be a whole number of at least output_len"),
        (spec({"block_size": 0}), "spec.json", "block_size"),
        (spec({"latency": [0.1]}), "spec.json", "latency"),
        (spec({"enable_chunked_prefill": 1}), "spec.json", "true or false"),
        ("", "requests.csv", "requests.csv: the file is empty"),
        ("arrival_time,prompt_len\n0,1\n", "requests.csv", "requests.csv, line 1: no column 'output_len' of jaxroute"),
        ("arrival_time,prompt_len,output_len\n0,1,x\n", "requests.csv", "requests.csv, line 2: 'output_len'"),
        ("arrival_time,prompt_len,output_len\n", "requests.csv", "has a header but no rows"),
        ("arrival_time,prompt_len,output_len\nnan,1,1\n", "requests.csv", "requests.csv, line 2: 'arrival_time'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, text, name, says):
    code, got = run(tmp_path, text, name)
    assert (code, got) == (2, None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error, error


def test_missing_file_and_unwritable_out(tmp_path, capsys):
    assert main([str(tmp_path / "none.json"), "--out", str(tmp_path / "out.json")]) == 2
    good = tmp_path / "spec.json"
    good.write_text(json.dumps(GOOD))
    assert main([str(good), "--out", str(tmp_path)]) == 2
    assert main([str(good), "--out", str(tmp_path / "no" / "out.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "no such file" in lines[0]
    assert all("cannot be written" in line for line in lines[1:])
