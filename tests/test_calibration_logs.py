"""Logs and engine options from files: every format that there is, and one clear line for every bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from jaxroute.calibration.judgement import load_at_arrival, splits
from jaxroute.calibration.logs import load_log, shared_segments
from jaxroute.calibration.options import check_fits, load_options
from jaxroute.calibration.space import peak_running, search_space
from jaxroute.commands.calibrate import main
from jaxroute.errors import UserError

ROWS = [
    {
        "arrival_time": 0.5 * i,
        "prompt_len": 20 + i,
        "output_len": 3,
        "first_token_time": 0.5 * i + 0.1,
        "finish_time": 0.5 * i + 0.2,
    }
    for i in range(24)
]


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_project_formats_and_the_recorded_one_agree(tmp_path):
    names = {"arrival_time": "arrival_s", "prompt_len": "prompt_tokens", "output_len": "output_tokens"}
    names |= {"first_token_time": "first_token_s", "finish_time": "last_token_s"}
    own = load_log(jsonl(tmp_path / "a.jsonl", ROWS))
    # There the engine's clock says when a request came, and times need not begin at 0.
    recorded = [
        {"request_id": 7 + i, **{names[key]: value + ("len" not in key) for key, value in row.items()}}
        for i, row in enumerate(ROWS)
    ]
    for row in recorded:
        row |= {"queued_s": row["arrival_s"] + 0.01, "shared_prefix_tokens": 16, "arrival_s": row["arrival_s"] - 0.3}
    other = load_log(jsonl(tmp_path / "b.jsonl", recorded))
    lines = [",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    table = load_log(tmp_path / "c.csv")
    for field in ("arrival", "first_token", "finish", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(own, field), getattr(table, field))
        late = -0.01 if field in ("first_token", "finish") else 0.0
        assert np.allclose(getattr(own, field) + late, getattr(other, field))
    assert other.ids[0] == 7 and other.shared_tokens is not None and own.shared_tokens is None
    assert np.allclose(own.measured["tpot"], 0.05)
    (tmp_path / "a_timeseries.csv").write_text("t,running,waiting\n1,2,3\n")
    series = load_log(tmp_path / "a.jsonl").series
    assert series is not None and series["waiting"].tolist() == [3]


def benchmark_result(**changes):
    count = 24
    return {
        "input_lens": [20] * count,
        "output_lens": [3] * count,
        "ttfts": [0.1] * count,
        "itls": [[0.05, 0.05]] * count,
        "start_times": [100.0 + i for i in reversed(range(count))],
        "errors": ["", "timed out", *[""] * (count - 2)],
        **changes,
    }


def test_result_of_vllms_benchmark(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(benchmark_result()))
    log = load_log(path)
    assert len(log) == 23 and log.reading is not None and log.reading.left_out == {"failed": 1}
    assert log.arrival[0] == 0 and (np.diff(log.arrival) > 0).all()
    assert np.allclose(log.measured["e2e"], 0.2)
    for changes, problem in (
        ({"itls": None}, "no list itls; save the details of each request .vLLM: --save-result --save-detailed"),
        ({"start_times": None}, "no list start_times"),
        ({"ttfts": [0.1]}, "ttfts has 1 entries, input_lens 24"),
    ):
        path.write_text(json.dumps(benchmark_result(**changes)))
        with pytest.raises(UserError, match=problem):
            load_log(path)
    path.write_text(json.dumps(benchmark_result(start_times=None, request_rate="inf")))
    assert not load_log(path).arrival.any()


def changed(index, **values):
    return [{**row, **(values if i == index else {})} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "rows, problem",
    [
        (
            [{k: v for k, v in row.items() if k != "finish_time"} for row in ROWS],
            "line 1: no column 'finish_time', a time of tokens",
        ),
        (changed(5, arrival_time=0.1), "line 6: its time lies before that of the row above; sort the rows by time"),
        (changed(5, first_token_time=2.4), "line 6: 'first_token_time' 2.4 is before 'arrival_time' 2.5"),
        (changed(5, finish_time=2.55), "line 6: 'finish_time' 2.55 is before 'first_token_time' 2.6"),
        (changed(5, output_len=0), "line 6: 'output_len' must be a whole number of tokens from 1"),
        (changed(5, arrival_time="soon"), "line 6: 'arrival_time' must be a finite number"),
        (ROWS[:19], "too few requests to calibrate on, 19; give 20 or more"),
        ([], "the file is empty"),
    ],
)
def test_bad_logs_are_one_line_and_leave_nothing_behind(tmp_path, capsys, rows, problem):
    path = jsonl(tmp_path / "log.jsonl", rows)
    assert main([str(path), "--out", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("num_gpu_blocks: 3", "cannot hold request 11 of"),
        ("max_model_len: 40", "cannot hold request 18 of"),
        ("{max_num_batched_tokens: 25, enable_chunked_prefill: false}", "cannot hold request 6 of"),
        ("num_gpu_block: 2", "unknown engine option 'num_gpu_block'; the nearest are num_gpu_blocks"),
        ("data_parallel_size: 0", "data_parallel_size must be a whole number from 1 to 64"),
        ("max_num_seqs: many", "max_num_seqs must be a whole number"),
        ("[1, 2]", "must be a mapping of engine options"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_engine_files(tmp_path, capsys, text, problem):
    path, engine = jsonl(tmp_path / "log.jsonl", ROWS), tmp_path / "engine.yaml"
    engine.write_text(text)
    assert main([str(path), "--engine", str(engine), "--out", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [engine, path]


def test_bad_outputs_are_found_before_the_search(tmp_path, capsys):
    path = str(jsonl(tmp_path / "log.jsonl", ROWS))
    for out, problem in (("p.json", "ends in .yaml"), ("none/p.yaml", "cannot be written")):
        assert main([path, "--out", str(tmp_path / out)]) == 2
        assert problem in capsys.readouterr().err


def test_options_from_the_sections_of_a_recorded_run(tmp_path):
    tree = {
        "model": "meta-llama/Llama-3.1-8B",
        "engine_kwargs": {"max_num_seqs": 128, "max_model_len": None, "data_parallel_size": 2},
        "cache_config": {"num_gpu_blocks": None, "enable_prefix_caching": True},
        "scheduler_config": {"scheduler_reserve_full_isl": False},
        "hardware": {"device_name": "NVIDIA GeForce RTX 4090"},
    }
    path = tmp_path / "x_config.json"
    path.write_text(json.dumps(tree))
    options = load_options(path)
    assert options.engine == {"max_num_seqs": 128, "reserve_full_isl": False}
    assert options.unknown == ["num_gpu_blocks", "max_num_batched_tokens", "max_model_len"]
    assert (options.data_parallel_size, options.enable_prefix_caching) == (2, True)
    assert options.gpu == "NVIDIA GeForce RTX 4090"
    log = load_log(jsonl(tmp_path / "log.jsonl", ROWS))
    check_fits(log, options)
    names = search_space(log, options).names
    assert names[6:] == ["num_gpu_blocks", "max_num_batched_tokens", "request_overhead"]


def test_splits_and_loads(tmp_path):
    slow = range(8, 14)
    rows = [{**row, "finish_time": row["finish_time"] + (5 if i in slow else 0)} for i, row in enumerate(ROWS)]
    log = load_log(jsonl(tmp_path / "log.jsonl", rows))
    assert load_at_arrival(log)[8:16].tolist() == [*range(7), 6] and peak_running(log) == 7
    by_parity, by_time, *by_load = splits(log)
    assert by_parity.fitted[:4].tolist() == [True, False, True, False]
    assert by_time.fitted.sum() == 12
    assert [split.name for split in by_load] == ["lower loads fitted, higher loads judged"]


@pytest.mark.parametrize(("line", "searched"), [("", True), ("null", True), ("true", True), ("false", False)])
def test_shared_prefixes_are_used_unless_the_server_has_no_cache(tmp_path, line, searched):
    path = tmp_path / "engine.yaml"
    path.write_text("max_num_seqs: 64\n" + (f"enable_prefix_caching: {line}\n" if line else ""))
    log = load_log(jsonl(tmp_path / "log.jsonl", [{**row, "shared_prefix_tokens": 1} for row in ROWS]))
    assert ("prefix_hits" in search_space(log, load_options(path)).names) == searched
    without = load_log(jsonl(tmp_path / "without.jsonl", ROWS))
    assert "prefix_hits" not in search_space(without, load_options(path)).names


def test_a_version_simulates_prefix_caching_instead_of_a_share(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text("engine: vllm-0.19\ngpu: NVIDIA H100\nmax_num_batched_tokens: null\nmax_num_seqs: 64\n")
    options = load_options(path)
    assert options.version == "vllm-0.19" and options.engine["async_scheduling"]
    assert options.engine["max_num_seqs"] == 64 and "max_num_batched_tokens" in options.unknown
    log = load_log(jsonl(tmp_path / "log.jsonl", [{**row, "shared_prefix_tokens": 16} for row in ROWS]))
    space = search_space(log, options)
    assert "prefix_hits" not in space.names and space.engine.enable_prefix_caching
    path.write_text("engine: vllm-0.33\ngpu: NVIDIA H100\nenable_prefix_caching: false\n")
    options = load_options(path)
    assert options.engine["max_num_seqs"] == 1024 and options.unknown == ["num_gpu_blocks", "max_model_len"]
    assert not search_space(log, options).engine.enable_prefix_caching
    for line, words in (
        ("engine: vllm-0.20", "engine.yaml: unknown engine 'vllm-0.20'"),
        ("engine: vllm-0.6", "engine.yaml: engine vllm-0.6 is no V1 engine"),
        ("engine: 0.33", "engine.yaml: engine must be a version, such as vllm-0.19, not 0.33"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=re.escape(words)):
            load_options(path)


def test_shared_tokens_are_those_of_the_turn_before(tmp_path):
    """The latest earlier prompt of that many whole blocks; without one, the latest that is as long; else nobody."""
    lengths = [(100, 0), (40, 0), (160, 96), (100, 48), (200, 160), (33, 32), (20, 500)]
    rows = [{**row, "prompt_len": 30, "shared_prefix_tokens": 0} for row in ROWS]
    rows = [
        row | {"prompt_len": prompt, "shared_prefix_tokens": shared}
        for row, (prompt, shared) in zip(rows, lengths, strict=False)
    ]
    rows += [{**row, "prompt_len": 30, "shared_prefix_tokens": 0} for row in ROWS[len(rows) :]]
    got = shared_segments(load_log(jsonl(tmp_path / "log.jsonl", rows)))
    assert got[:3] == [[[0, 100]], [[1, 40]], [[0, 96], [2, 64]]]
    assert got[3] == [[0, 48], [3, 52]], "request 2 is as long, and begins as request 0"
    assert got[4] == [[0, 96], [2, 64], [4, 40]]
    assert got[5] == [[1, 32], [5, 1]]
    assert sum(tokens for _, tokens in got[6]) == 20
