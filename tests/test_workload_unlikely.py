"""Files that cannot mean what they say are refused, and unlikely ones are read with a warning: the kinds of faults
that users met, each with further inputs of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxroute
from jaxroute.calibration.logs import load_log
from jaxroute.commands import calibrate, replay
from jaxroute.errors import UserError
from jaxroute.workload import load_trace
from jaxroute.workload.reading import Reading, collect_readings


def lines(path: Path, times: list[float], output: int = 10) -> Path:
    path.write_text("".join(f'{{"timestamp": {t}, "input_length": 100, "output_length": {output}}}\n' for t in times))
    return path


def own(path: Path, times: list[float], output: int = 10) -> Path:
    path.write_text("arrival_time,prompt_len,output_len\n" + "".join(f"{t},100,{output}\n" for t in times))
    return path


def read(path: Path, **options: Any) -> Reading:
    with collect_readings() as (readings):
        load_trace(path, **options)
    return readings[0]


BURSTS = {
    "three bursts, a minute apart": [0] * 100 + [60000] * 100 + [120000] * 100,
    "two bursts": [0] * 10 + [7] * 10,
    "bursts at odd times": [0] * 5 + [1000] * 9 + [3333] * 7,
    "one burst": [5000] * 30,
    "ties among others": [0, 0, 700, 1100, 1100, 1100, 9000],
}


@pytest.mark.parametrize("times", BURSTS.values(), ids=BURSTS.keys())
def test_bursts_stay_bursts(times: list[float], tmp_path: Path):
    with collect_readings() as (readings):
        trace = load_trace(lines(tmp_path / "burst.jsonl", times))
        same = load_trace(own(tmp_path / "burst.csv", [time / 1000 for time in times]))
    np.testing.assert_allclose(trace.times * 1000, np.asarray(times) - times[0])
    np.testing.assert_allclose(trace.times, same.times)
    ties = len(times) - len(set(times))
    assert all(reading.equal_times == ties for reading in readings)
    assert f"{ties:,} at the time of the one before" in readings[0].line()


def test_bursts_reach_the_environment(tmp_path: Path):
    path = lines(tmp_path / "burst.jsonl", BURSTS["three bursts, a minute apart"])
    with collect_readings():
        _, params = jaxroute.make("azure", path=path, rate_scale=1.0)
    assert (np.asarray(params.workload.arrivals.gaps[1:]) == 0).sum() == 297


UNITS = {
    "seconds read as ms": (lines, [i / 5 for i in range(50)], {}, ("fractions of 1 ms", "5,000 requests/s")),
    "whole seconds read as ms": (lines, [i // 2 for i in range(50)], {}, ("2,042 requests/s", "multiples of 0.001 s")),
    "seconds, and said": (lines, [i / 5 for i in range(50)], {"time_unit": "s"}, ()),
    "ms read as seconds": (own, [200 * i for i in range(50)], {}, ("one request every 200 s",)),
    "ms, and said": (own, [200 * i for i in range(50)], {"time_unit": "ms"}, ()),
    "ns, and said": (own, [200_000_000 * i for i in range(50)], {"time_unit": "ns"}, ()),
    "ordinary": (own, [i / 5 for i in range(50)], {}, ()),
}


@pytest.mark.parametrize(("write", "times", "options", "said"), UNITS.values(), ids=UNITS.keys())
def test_a_wrong_unit_is_seen(write: Any, times: list[float], options: dict, said: tuple[str, ...], tmp_path: Path):
    reading = read(write(tmp_path / "a", times), **options)
    assert f"{reading.rate:,.4g} requests/s" in reading.line()
    assert len(reading.warnings) == len(said)
    assert all(any(text in warning for warning in reading.warnings) for text in said)
    if not said:
        assert not reading.warnings and reading.rate == pytest.approx(5)


@pytest.mark.parametrize("time", [1.7e12, 1e300, 1.7e18])
def test_times_beyond_any_date_are_refused(time: float, tmp_path: Path):
    with pytest.raises(UserError, match="line 3: 'arrival_time' is .*, in s beyond the year 5138; name its unit"):
        load_trace(own(tmp_path / "a.csv", [0, time]))


def test_a_median_answer_of_one_token_is_unlikely(tmp_path: Path):
    assert "the median answer has one token" in read(own(tmp_path / "a", [0, 1, 2], output=1)).warnings[0]
    with pytest.warns(UserWarning, match="the median answer has one token"):
        load_trace(tmp_path / "a")


def test_half_the_rows_left_out_is_unlikely(tmp_path: Path):
    rows = [f"{i},ChatGPT,100,{0 if i % 3 else 9},100,API log" for i in range(30)]
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    path = tmp_path / "BurstGPT.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    reading = read(path)
    assert reading.left_out == {"failed (no response tokens)": 20} and "20 of 30 rows left out" in reading.warnings[0]
    assert "10 of 30 rows used (left out: 20 failed (no response tokens))" in reading.line()


def benchmark(**changes: Any) -> dict[str, Any]:
    count = 24
    return {
        "request_rate": 2.0,
        "max_concurrency": None,
        "input_lens": [30 + i for i in range(count)],
        "output_lens": [20 + i for i in range(count)],
        "ttfts": [0.02] * count,
        "itls": [[0.012] * (19 + i) for i in range(count)],
        "start_times": [0.5 * i for i in range(count)],
        "errors": [""] * count,
        **changes,
    }


WHOLE = [0.02 + 0.012 * (19 + i) for i in range(24)]
CONTRADICTIONS = {
    "not streamed": ({"itls": [[]] * 24, "ttfts": WHOLE}, "no inter-token latencies, 24 requests with itls empty"),
    "no first-token time": ({"ttfts": [0.0] * 24, "itls": [[t] for t in WHOLE]}, "24 requests with ttfts 0"),
    "no gap is longer than 0": ({"itls": [[0.0] * 19] * 24}, "24 requests with several tokens at one time"),
    "fewer tokens than came": ({"output_lens": [1] * 24}, "entry 0: output_lens is 1, but itls has 19 gaps: more tok"),
    "half the tokens": (
        {"output_lens": [10 + i // 2 for i in range(24)]},
        "entry 0: output_lens is 10, but itls has 19",
    ),
    "one entry's count": ({"output_lens": [*range(20, 43), 2]}, "entry 23: output_lens is 2, but itls has 42 gaps"),
    "negative gap": ({"itls": [[-0.1]] * 24}, "entry 0: itls must be a finite number, 0 or more, is -0.1"),
    "lists of two lengths": ({"ttfts": [0.02] * 23}, "ttfts has 23 entries, input_lens 24; the file is not whole"),
    "errors cut": ({"errors": [""]}, "errors has 1 entries, input_lens 24"),
    "all failed": ({"errors": ["refused"] * 24}, "has no request that can be used .24 failed"),
    "no start times": ({"start_times": None}, "no list start_times.*32667"),
    "no start times, concurrency": (
        {"start_times": None, "request_rate": "inf", "max_concurrency": 4},
        "no list start_times, which say when each request was sent; vLLM saves it since January 2026",
    ),
}


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_results_that_contradict_themselves_are_refused(
    changes: dict, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(benchmark(**changes)))
    with pytest.raises(UserError, match=problem):
        load_log(path)
    assert calibrate.main([str(path), "--out", str(tmp_path / "p.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rate", [float("inf"), "inf", "Infinity"])
def test_all_sent_at_once_needs_no_start_times(rate: Any, tmp_path: Path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(benchmark(start_times=None, request_rate=rate)))
    log = load_log(path)
    assert len(log) == 24 and not log.arrival.any()


def test_a_few_requests_without_times_are_left_out_and_counted(tmp_path: Path):
    values = benchmark()
    values["itls"][3], values["ttfts"][5], values["output_lens"][7], values["errors"][9] = [], 0.0, 0, "timed out"
    path = tmp_path / "result.json"
    doubled = {key: values[key] * 2 for key in ("ttfts", "itls", "errors", "output_lens", "input_lens")}
    path.write_text(json.dumps({**values, **doubled, "start_times": [0.5 * i for i in range(48)]}))
    log = load_log(path)
    assert len(log) == 40 and log.reading is not None
    assert log.reading.left_out == {
        "with itls empty and output_lens above 1": 2,
        "with ttfts 0": 2,
        "without output tokens": 2,
        "failed": 2,
    }
    # Arrivals and lengths need no times of tokens.
    assert read(path).used == 44


def test_a_chat_may_send_a_chunk_or_two_without_a_token(tmp_path: Path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(benchmark(itls=[[0.012] * (21 + i) for i in range(24)])))
    log = load_log(path)
    assert log.reading is not None and "24 with a gap or two more than tokens, as chats send" in log.reading.changed


@pytest.mark.parametrize(
    ("scale", "said"), [(1000.0, "the median tpot is 12 s"), (1e-3, "the median tpot is 1.2e-05 s")]
)
def test_latencies_in_another_unit_are_unlikely(scale: float, said: str, tmp_path: Path):
    values = benchmark()
    path = tmp_path / "result.json"
    gaps = [[gap * scale for gap in gaps] for gaps in values["itls"]]
    scaled = {"itls": gaps, "ttfts": [ttft * scale for ttft in values["ttfts"]]}
    path.write_text(json.dumps({**values, **scaled}))
    log = load_log(path)
    assert log.reading is not None and any(said in warning for warning in log.reading.warnings)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
UNSERVABLE = {
    "prompt above max_model_len": ("V1", {}, 14050, "request 1 (14,050 prompt tokens) exceeds max_model_len 8,192"),
    "prompt of max_model_len": ("V1", {}, 8192, "request 1 (8,192 prompt tokens) exceeds max_model_len 8,192"),
    "KV cache too small": (
        "V1",
        {"num_gpu_blocks": 10},
        300,
        "request 1 (300 + 20 tokens) exceeds the KV cache of",
    ),
    "prefill not chunked": (
        "V1",
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
        300,
        "request 1 (300 + 20 tokens) exceeds what one iteration",
    ),
}


@pytest.mark.parametrize(("engine", "config", "prompt", "said"), UNSERVABLE.values(), ids=UNSERVABLE.keys())
def test_a_request_that_stalls_the_engine_is_named(
    engine: str, config: dict, prompt: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    requests = [{"arrival_time": i, "prompt_len": prompt if i == 1 else 100, "output_len": 20} for i in range(3)]
    path, out = tmp_path / "spec.json", tmp_path / "out.json"
    path.write_text(json.dumps({"engine": engine, "config": config, "requests": requests}))
    assert replay.main([str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "stalled: " in printed and f"not finished: {said}" in printed
    assert replay.main([str(path), "--out", str(out), "--leave-out-unservable"]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert f"left out: {said}" in printed and "ok: 2 of 2 requests finished" in printed
    assert list(written["per_request"]) == ["0", "2"] and list(written["left_out"]) == ["1"]


ENDED = {
    "V0 ignores it": (
        "V0",
        {"num_gpu_blocks": 12},
        300,
        20,
        "1 ignored, ",
        "not finished: request 1 (300 + 20 tokens)",
    ),
    "answer cut": (
        "V1",
        {},
        8000,
        500,
        "ok: 3 of 3",
        "ended early by max_model_len: request 1 (after 192 of 500 tokens)",
    ),
    "Orca answers once": (
        "orca",
        {},
        9000,
        20,
        "ok: 3 of 3",
        "ended early by max_model_len: request 1 (after 1 of 20 tok",
    ),
    "iterations": (
        "V1",
        {"max_iterations": 5},
        9,
        20,
        "max_iterations: 0 of 3",
        "stopped at max_iterations; a larger one",
    ),
}


@pytest.mark.parametrize(("engine", "config", "prompt", "output", "status", "said"), ENDED.values(), ids=ENDED.keys())
def test_a_request_that_ends_otherwise_is_named(
    engine: str, config: dict, prompt: int, output: int, status: str, said: str, tmp_path: Path, capsys: Any
):
    requests = [
        {"arrival_time": i, "prompt_len": prompt if i == 1 else 100, "output_len": output if i == 1 else 20}
        for i in range(3)
    ]
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"engine": engine, "config": config, "requests": requests}))
    assert replay.main([str(path), "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert status in printed and said in printed


def test_an_engine_that_serves_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "long.csv"
    path.write_text(AZURE + "2023-11-16 18:00:00.0000000,14050,39\n")
    assert replay.main([str(path), "--out", str(tmp_path / "o.json"), "--leave-out-unservable"]) == 2
    assert "can serve none of its requests; request 0 (14,050 prompt tokens)" in capsys.readouterr().err
