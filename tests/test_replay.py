"""The replay command: what it writes, and one clear line with exit code 2 for every bad input."""

from __future__ import annotations

import json

import pytest

from jaxroute.replay import main, replay
from tests.reference.engine import simulate

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
    assert got == replay({"config": {}, "requests": requests})
    assert got is not None and got["status"] == "ok"


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


def spec(config: dict | None = None, **request) -> str:
    return json.dumps({"config": config or {}, "requests": [{**GOOD["requests"][0], **request}]})


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "spec.json", "line 1: not JSON"),
        ("[]", "spec.json", "requests"),
        ('{"requests": []}', "spec.json", "there is no request"),
        (spec(arrival_time=-1), "spec.json", "requests[0]: arrival_time"),
        (spec(arrival_time=float("nan")), "spec.json", "requests[0]: arrival_time"),
        (spec(prompt_len=0), "spec.json", "requests[0]: prompt_len"),
        (spec(output_len=1.5), "spec.json", "requests[0]: output_len"),
        (spec(arrival_iteration=3), "spec.json", "not both"),
        (spec({"max_num_seq": 4}), "spec.json", "max_num_seqs"),
        (spec({"block_size": 0}), "spec.json", "block_size"),
        (spec({"latency": [0.1]}), "spec.json", "latency"),
        (spec({"enable_chunked_prefill": 1}), "spec.json", "true or false"),
        ("", "requests.csv", "requests.csv: the file is empty"),
        ("arrival_time,prompt_len\n0,1\n", "requests.csv", "requests.csv, line 1: no column 'output_len'"),
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
    assert len(lines) == 3 and all("cannot be" in line for line in lines)
