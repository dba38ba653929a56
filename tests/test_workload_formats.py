"""Each format of recorded requests by content, in the reader and in the commands; options; what is said of it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxroute
from jaxroute.calibration.logs import load_log
from jaxroute.commands.calibrate import main as calibrate
from jaxroute.commands.replay import main as replay
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.errors import UserError
from jaxroute.simulator.replay import load_spec
from jaxroute.workload import TraceArrivals, load_mixinstruct, load_trace
from jaxroute.workload.estimate import estimated_tokens
from jaxroute.workload.formats import FORMATS
from jaxroute.workload.reading import collect_readings
from tests.odd_inputs import figures
from tests.request_files import EXAMPLES, REQUESTS, TIMED, Example

WANTED = np.asarray(figures(REQUESTS))
by_name = {example.name: example for example in EXAMPLES}


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".txt.gz", ""])
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_format_is_recognised_whatever_its_name(number: int, ending: str, tmp_path: Path):
    example, path = EXAMPLES[number], tmp_path / f"requests{ending}"
    content = example.text(example.rows()).replace("\n", "\r\n").encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    trace = load_trace(path)
    assert trace.reading is not None and trace.reading.format == example.name
    np.testing.assert_allclose(trace.times * 1000, WANTED[:, 0], atol=1e-3)
    np.testing.assert_array_equal(trace.prompt_tokens, WANTED[:, 1])
    np.testing.assert_array_equal(trace.output_tokens, WANTED[:, 2])
    assert load_spec(path)["requests"][3]["prompt_len"] == REQUESTS[3].prompt
    if example.name in TIMED:
        log = load_log(path)
        np.testing.assert_allclose(log.measured["ttft"] * 1000, [r.ttft for r in REQUESTS], atol=1e-3)
        np.testing.assert_allclose(log.measured["tpot"] * 1000, [r.gap for r in REQUESTS], atol=1e-3)
    else:
        with pytest.raises(UserError, match="has no times of tokens"):
            load_log(path)


def test_the_examples_and_the_page_name_every_format():
    known = {form.name for form in FORMATS}
    assert known == set(by_name)
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(): line for line in page.splitlines() if re.match(r"\| [\w ]+ \|.*\|.*\|.*\|", line)
    }
    assert known <= set(rows)
    for name in known:
        assert rows[name].rstrip(" |").endswith("yes") == (name in TIMED)
        example = by_name[name]
        for cell in (example.time, example.prompt, example.output) if example.kind != "document" else ():
            assert f"`{cell.split('.')[0]}`" in rows[name]


def written(path: Path, name: str, **changes: Any) -> Path:
    """The example of a format in a file, with each row changed."""
    example = by_name[name]
    path.write_text(example.text([{**row, **changes} for row in example.rows()]))
    return path


def test_a_training_takes_them_and_says_what_it_read(tmp_path: Path):
    for name in ("vLLM benchmark", "BurstGPT"):
        path = written(tmp_path / "requests", name)
        override = f"workload={{arrivals: {{kind: trace, path: {path}}}, requests: {{kind: trace}}}}"
        experiment = build_experiment(load_config(None, [override]))
        assert isinstance(experiment.params.workload.arrivals, TraceArrivals)
        assert experiment.notes[0].startswith(f"read {path}: {name}, 24 of 24 rows used; 9.274 s long, 2.48 requests/s")
        (reading,) = experiment.readings
        assert json.loads(json.dumps(reading.facts()))["output_tokens"] == {"median": 4.0, "p99": 6.0}
    scenario = build_experiment(load_config(None, ["environment.id=azure", f"environment.path={path}"]))
    assert scenario.readings == experiment.readings


def test_options_reach_the_reader(tmp_path: Path):
    ticks = tmp_path / "ticks.jsonl"
    ticks.write_text(
        "".join(f'{{"timestamp": {i // 4 * 3}, "input_length": 9, "output_length": 9}}\n' for i in range(16))
    )
    options = ["time_unit=s", "spread_ticks=true"]
    overrides = ["workload.arrivals.kind=trace", f"workload.arrivals.path={ticks}"]
    experiment = build_experiment(load_config(None, [*overrides, *(f"workload.arrivals.{x}" for x in options)]))
    changed = experiment.readings[0].changed
    assert changed == ("times in s, as time_unit says (the format has ms)", "times spread over ticks of 3 s")
    assert not experiment.readings[0].warnings
    env, params = jaxroute.make("azure", path=ticks, time_unit="s", spread_ticks=True)
    np.testing.assert_allclose(params.workload.arrivals.gaps[1:], 0.75)
    in_scenario = ["environment.id=azure", f"environment.path={ticks}", *(f"workload.arrivals.{x}" for x in options)]
    assert build_experiment(load_config(None, in_scenario)).readings[0].changed == changed
    with pytest.raises(UserError, match="unknown environment option 'time_unit'"):
        build_experiment(load_config(None, ["workload.arrivals.time_unit=s"]))
    spread = load_spec(ticks, time_unit="s", spread_ticks=True)["requests"]
    assert [request["arrival_time"] for request in spread[:5]] == [0, 0.75, 1.5, 2.25, 3]
    for problem, arguments in {
        "unknown time_unit 'h'; the nearest are": {"time_unit": "h"},
        "run is 2, but Mooncake files hold one list": {"run": 2},
    }.items():
        with pytest.raises(UserError, match=problem):
            load_trace(ticks, **arguments)
    with pytest.raises(UserError, match="its times are dates, which have no unit"):
        load_trace(written(tmp_path / "azure", "Azure LLM"), time_unit="ms")
    with pytest.raises(UserError, match="time_unit is for columns of times; guidellm has its own"):
        load_trace(written(tmp_path / "report", "guidellm"), time_unit="ms")


def test_one_of_appended_results_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """vLLM's --append-result writes a line for each result; a guidellm sweep is a list of benchmarks."""
    vllm, half = by_name["vLLM benchmark"], REQUESTS[:20]
    appended = tmp_path / "appended.json"
    appended.write_text(vllm.text(vllm.rows()) + "\n" + vllm.text(vllm.rows(half)))
    guidellm = by_name["guidellm"]
    parts = [json.loads(guidellm.text(guidellm.rows(requests)))["benchmarks"][0] for requests in (REQUESTS, half)]
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"benchmarks": parts}, indent=1))
    for path in (appended, sweep):
        with pytest.raises(UserError, match="holds 2 results .*; choose one with run=1 to 2"):
            load_trace(path)
        assert [len(load_log(path, run=run)) for run in (1, 2)] == [24, 20]
        assert "result 2 of 2" in load_trace(path, run=2).reading.line()  # pyright: ignore
        with pytest.raises(UserError, match="run is 3, and the file holds 2 results"):
            load_trace(path, run=3)
    assert calibrate([str(appended), "--run", "3", "--out", str(tmp_path / "p.yaml")]) == 2
    assert replay([str(appended), "--run", "2", "--out", str(tmp_path / "o.json")]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"read {appended}: vLLM benchmark, 20 of 20 rows used; ") and "result 2 of 2" in out
    assert json.loads((tmp_path / "o.json").read_text())["read"][0]["changed"][0] == "result 2 of 2"


OLDER = {
    "guidellm 0.2": (
        "guidellm",
        lambda i, r: {
            "prompt_tokens": r.prompt,
            "output_tokens": r.output,
            "start_time": 1.7e9 + r.time / 1000,
            "first_token_time": 1.7e9 + (r.time + r.ttft) / 1000,
            "last_token_time": 1.7e9 + (r.time + r.ttft + r.gap * (r.output - 1)) / 1000,
        },
    ),
    "guidellm without computed fields": (
        "guidellm",
        lambda i, r: {
            "input_metrics.total_tokens": r.prompt,
            "output_metrics.total_tokens": r.output,
            "info.timings.resolve_start": r.time / 1000,
            "info.timings.first_token_iteration": (r.time + r.ttft) / 1000,
            "info.timings.last_token_iteration": (r.time + r.ttft + r.gap * (r.output - 1)) / 1000,
        },
    ),
    "aiperf 0.1": (
        "aiperf",
        lambda i, r: {
            "metadata.timestamp_ns": 1759522419154829652 + r.time * 10**6,
            "metadata.credit_phase": "profiling",
            "metrics.ttft": {"value": r.ttft / 1000, "unit": "s"},
            "metrics.request_latency": {"value": 10**6 * (r.ttft + r.gap * (r.output - 1)), "unit": "ns"},
            "metrics.input_sequence_length.value": r.prompt,
            "metrics.output_sequence_length.value": float(r.output),
        },
    ),
}


@pytest.mark.parametrize(("name", "row"), OLDER.values(), ids=OLDER.keys())
def test_other_versions_of_the_tools(name: str, row: Any, tmp_path: Path):
    example, path = by_name[name], tmp_path / "export"
    path.write_text(example.text([row(i, r) for i, r in enumerate(REQUESTS)]))
    log = load_log(path)
    np.testing.assert_allclose(log.arrival * 1000, WANTED[:, 0], atol=1e-3)
    np.testing.assert_allclose(log.measured["ttft"] * 1000, [r.ttft for r in REQUESTS], atol=1e-3)
    np.testing.assert_allclose(log.measured["tpot"] * 1000, [r.gap for r in REQUESTS], atol=1e-3)


def test_an_sglang_result_has_no_start_times_but_may_be_sent_at_once(tmp_path: Path):
    result = json.loads(Example.text(by_name["vLLM benchmark"], by_name["vLLM benchmark"].rows()))
    del result["start_times"]
    path = tmp_path / "bench.jsonl"
    for rate in (float("inf"), "inf"):
        path.write_text(json.dumps({**result, "backend": "sglang", "request_rate": rate}) + "\n")
        log = load_log(path)
        assert not log.arrival.any() and log.reading is not None and "all sent at once" in log.reading.line()
    for changes in ({"request_rate": 4.0}, {"request_rate": "inf", "max_concurrency": 4}):
        path.write_text(json.dumps({**result, **changes}))
        with pytest.raises(UserError, match="no list start_times.* since January 2026 .pull request 32667."):
            load_log(path)


SUMMARIES = {
    "vLLM without details": ('{"backend": "vllm", "mean_ttft_ms": 3.1, "request_rate": 2}', "no list input_lens; save"),
    "guidellm without requests": ('{"benchmarks": [{"requests": {}}]}', "no list of successful requests; export"),
    "ServeGen's rates of a client": ("0,1.16,0.98,Gamma,1.03,0.82\n600,1.1,1,Gamma,1,1\n", "no column names"),
    "columns of two formats": (
        "timestamp,input_length,output_length,arrival_time,prompt_len,output_len\n0,1,1,0,1,1\n",
        "has the columns of jaxroute and of Mooncake; keep those of one format",
    ),
}


@pytest.mark.parametrize(("text", "problem"), SUMMARIES.values(), ids=SUMMARIES.keys())
def test_what_is_no_list_of_requests_is_named(text: str, problem: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(text)
    for load in (load_trace, load_log):
        with pytest.raises(UserError, match=problem):
            load(path)


def test_recorded_answers_in_scripts_without_spaces(tmp_path: Path):
    """About one token a character; a very long word counts by its length; English text counts by words as ever."""
    assert estimated_tokens("two words") == (3.0, False)
    for text, low, high in (
        ("海の色を説明してください" * 20, 200, 300),
        ("ภาษาไทยเขียนติดกัน" * 10, 100, 200),
        ("안녕하세요 세계", 7, 10),
        ("看 the blue sea 海", 6, 7),
        ("QUJD" * 300, 300, 500),
    ):
        count, unspaced = estimated_tokens(text)
        assert unspaced and low <= count <= high
    record = {
        "instruction": "海の色" * 100,
        "candidates": [{"model": "a", "text": "蓝" * 400, "scores": {"bertscore": 1}}],
    }
    path = tmp_path / "cjk.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with collect_readings() as (readings):
        table = load_mixinstruct(path, ["a"])
    assert table.prompt_tokens.tolist() == [300] and table.output_tokens.tolist() == [[400]]
    assert "2 of 2 lengths estimated from the words (2 of texts without spaces" in readings[0].line()
