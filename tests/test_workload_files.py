"""The loaders of traces and recorded answers: what they read, and one clear line for everything they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workload import TableRequests, load_mixinstruct, load_trace

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
OWN = "arrival_time,prompt_len,output_len\n"
EXPERTS = ["alpaca-7b", "vicuna-7b"]


def real(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here: the data sets lie beside the project, not in it")
    return DATA / name


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mooncake(*rows: tuple[Any, Any, Any]) -> str:
    return "".join(json.dumps({"timestamp": t, "input_length": p, "output_length": o}) + "\n" for t, p, o in rows)


def record(**changes: Any) -> dict[str, Any]:
    """A MixInstruct-shaped record; `changes` apply to its first candidate."""
    candidates = [{"model": name, "text": "two words", "scores": {"bertscore": 0.5}} for name in EXPERTS]
    candidates[0].update(changes)
    return {"instruction": "Name three seas.", "input": "", "candidates": candidates}


# Traces


def test_azure_dates_keep_seven_decimals(tmp_path: Path):
    rows = ["2023-11-16 18:59:59.9799600,4808,10", "2023-11-16 19:00:00.0319600,3180,8", "2023-11-16 19:00:01,1,1"]
    trace = load_trace(written(tmp_path, "azure.csv", AZURE + "\r\n".join(rows)))
    np.testing.assert_allclose(trace.times, [0.0, 0.052, 1.02004], rtol=0, atol=1e-12)
    assert trace.prompt_tokens.tolist() == [4808, 3180, 1] and trace.output_tokens.tolist() == [10, 8, 1]
    assert trace.first_time == pytest.approx(1700161199.97996, abs=1e-6)


def test_azure_dates_with_an_offset(tmp_path: Path):
    rows = [
        "2024-05-10 00:00:00.009930+00:00,1,2",
        "2024-05-10T02:00:01.009930+02:00,1,2",
        "2024-05-10 00:00:01.5Z,1,2",
    ]
    trace = load_trace(written(tmp_path, "azure.csv", AZURE + "\n".join(rows)))
    np.testing.assert_allclose(trace.times, [0, 1, 1.49007], atol=1e-12)


def test_own_csv_in_any_column_order(tmp_path: Path):
    text = "\ufeffid,output_len, prompt_len,arrival_time\n0,7,5,2.5\n\n1,8,6,2.5\n2,9,7,4e0\n"
    trace = load_trace(written(tmp_path, "own.txt", text))
    assert trace.times.tolist() == [0, 0, 1.5] and trace.first_time == 2.5
    assert trace.prompt_tokens.tolist() == [5, 6, 7] and trace.output_tokens.tolist() == [7, 8, 9]
    assert trace.times.dtype == np.float64 and trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int32


def test_ticks_are_spread_only_if_asked_for(tmp_path: Path):
    rows = [(3000, 1, 9), (3000, 2, 9), (3000, 3, 9), (6000, 4, 9), (6000, 5, 9), (15000, 6, 9)]
    path = written(tmp_path, "mooncake.jsonl", mooncake(*rows))
    with pytest.warns(
        UserWarning, match="multiples of 3 s, with 2 requests each at once: bursts, or rounded .*spread_ticks"
    ):
        trace = load_trace(path)
    assert trace.times.tolist() == [0, 0, 0, 3, 3, 12]
    spread = load_trace(path, spread_ticks=True)
    np.testing.assert_allclose(spread.times, [0, 1, 2, 3, 4.5, 12])
    assert spread.reading is not None and "times spread over ticks of 3 s" in spread.reading.changed
    for odd in ([*rows, (17999, 7, 9)], rows[:3], rows[::3]):
        with pytest.raises(UserError, match="spread_ticks needs times that are multiples of one step"):
            load_trace(written(tmp_path, "odd", mooncake(*odd)), spread_ticks=True)


@pytest.mark.parametrize(
    ("name", "rows", "rate", "prompt", "output"),
    [
        ("azure_llm_2023_code.csv", 8819, 2.567, 2047.8, 27.9),
        ("azure_llm_2023_conv.csv", 19366, 5.530, 1154.7, 211.1),
        ("mooncake_conversation.jsonl", 12031, 3.401, 12035.1, 342.6),
    ],
)
def test_real_traces(name: str, rows: int, rate: float, prompt: float, output: float):
    trace = load_trace(real(name), spread_ticks="mooncake" in name)
    assert len(trace.times) == len(trace.prompt_tokens) == len(trace.output_tokens) == rows
    # Spreading puts the last arrival of Mooncake up to a tick, 0.1 % of the duration, later.
    assert rows / trace.times[-1] == pytest.approx(rate, rel=1e-3)
    assert trace.prompt_tokens.mean() == pytest.approx(prompt, abs=0.05)
    assert trace.output_tokens.mean() == pytest.approx(output, abs=0.05)
    assert trace.reading is not None and trace.reading.used == trace.reading.rows == rows
    assert trace.times[0] == 0 and (np.diff(trace.times) >= 0).all()


BAD_TRACES = {
    "empty": ("a.csv", "", "file is empty"),
    "only blank lines": ("a.csv", "\n\n", "file is empty"),
    "header only": ("a.csv", AZURE, "header but no rows"),
    "unknown columns": ("a.csv", "x,y\n1,2\n", "line 1: .*'x', 'y'.*arrival_time.*TIMESTAMP"),
    "missing column": (
        "a.csv",
        "TIMESTAMP,ContextTokens\n",
        "line 1: no column 'GeneratedTokens' of Azure LLM; the file has",
    ),
    "missing own column": (
        "a.csv",
        "arrival_time,output_len\n0,1\n",
        "line 1: no column 'prompt_len' of jaxroute; the file has",
    ),
    "short row": ("a.csv", OWN + "0,1,1\n1,1\n", "line 3: has 2 cells where the header has 3"),
    "negative time": ("a.csv", OWN + "-1,1,1\n", "line 2: 'arrival_time'.*0 or more, is '-1'"),
    "time not a number": ("a.csv", OWN + "nan,1,1\n", "line 2: 'arrival_time' must be a finite number"),
    "infinite time": ("a.csv", OWN + "0,1,1\ninf,1,1\n", "line 3: 'arrival_time'"),
    "no time": ("a.csv", OWN + ",1,1\n", "line 2: 'arrival_time'.*is ''"),
    "unsorted": ("a.csv", OWN + "0,1,1\n2,1,1\n1.5,1,1\n", "line 4: .*before.*sort"),
    "zero tokens": ("a.csv", OWN + "0,0,1\n", "line 2: 'prompt_len'.*from 1 to 2097151, is 0"),
    "negative tokens": ("a.csv", OWN + "0,1,-5\n", "line 2: 'output_len'.*is '-5'"),
    "fractional tokens": ("a.csv", OWN + "0,1.5,1\n", "line 2: 'prompt_len'.*is '1.5'"),
    "other digits": ("a.csv", OWN + "0,٣,1\n", "line 2: 'prompt_len'"),
    "too many tokens": ("a.csv", OWN + "0,2097151,1\n1,2097152,1\n", "line 3: 'prompt_len'.*2097151, is 2097152"),
    "huge tokens": ("a.csv", OWN + "0,1," + "9" * 5000 + "\n", "line 2: 'output_len'.*\\.\\.\\."),
    "azure date": ("a.csv", AZURE + "2023-13-16 18:17:03.9799600,1,1", "line 2: 'TIMESTAMP'.*'2023-13-16"),
    "azure number": ("a.csv", AZURE + "17.5,1,1", "line 2: 'TIMESTAMP' must be a date"),
    "azure unsorted": (
        "a.csv",
        AZURE + "2023-11-16 18:17:03.98,1,1\r\n2023-11-16 18:17:03.97,1,1",
        "line 3: .*before.*sort",
    ),
    "not UTF-8": ("a.csv", OWN.encode() + b"0,1,1\n0,\xff,1\n", "line 3: not UTF-8.*byte 3.*save"),
    "UTF-16": ("a.csv", OWN.encode("utf-16"), "line 1: not UTF-8"),
    "not JSON": ("a.jsonl", mooncake((0, 1, 1)) + "{oops\n", "line 2: not JSON.*one JSON object a line"),
    "huge JSON number": ("a.jsonl", '{"timestamp": ' + "9" * 5000 + "}", "line 1: not JSON"),
    "deep JSON": ("a.jsonl", "[" * 200_000, "line 1: not JSON"),
    "JSON list": ("a.jsonl", "[1, 2]\n", "line 1: not a JSON object but \\[1, 2\\]"),
    "missing key": (
        "a.jsonl",
        '{"timestamp": 0, "input_length": 3}',
        "line 1: no 'output_length' of Mooncake; it has 'timestamp'",
    ),
    "JSON NaN": ("a.jsonl", mooncake((float("nan"), 1, 1)), "line 1: 'timestamp'.*is nan"),
    "JSON negative time": ("a.jsonl", mooncake((-3, 1, 1)), "line 1: 'timestamp'.*is -3"),
    "JSON null time": ("a.jsonl", mooncake((None, 1, 1)), "line 1: 'timestamp'.*is None"),
    "JSON zero tokens": ("a.jsonl", mooncake((0, 1, 1), (0, 1, 0)), "line 2: 'output_length'.*is 0"),
    "JSON fractional tokens": ("a.jsonl", mooncake((0, 2.5, 1)), "line 1: 'input_length'.*is 2.5"),
    "JSON true for tokens": ("a.jsonl", mooncake((0, True, 1)), "line 1: 'input_length'.*is True"),
    "JSON unsorted": ("a.jsonl", mooncake((5, 1, 1), (4, 1, 1)), "line 2: .*before.*sort"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_TRACES.values(), ids=BAD_TRACES.keys())
def test_bad_trace_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str):
    path = written(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        load_trace(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_file_and_directory(tmp_path: Path):
    for load in (load_trace, lambda path: load_mixinstruct(path, EXPERTS)):
        with pytest.raises(UserError, match="absent.csv: no such file"):
            load(tmp_path / "absent.csv")
        with pytest.raises(UserError, match="is a directory"):
            load(tmp_path)


# Recorded answers


def test_mixinstruct_takes_what_the_file_has(tmp_path: Path):
    full = record(output_tokens=300, pred_output_tokens=280, pred_score=0.4)
    full["prompt_tokens"] = 400
    full["candidates"][1].update(output_tokens=5, pred_output_tokens=6, pred_score=0.7, scores={"bertscore": 1})
    path = written(tmp_path, "m.jsonl", json.dumps(full, ensure_ascii=False) + "\n")
    table = load_mixinstruct(path, ["vicuna-7b", "alpaca-7b", "vicuna-7b"])
    assert not table.predictions_made and not table.tokens_estimated
    assert table.prompt_tokens.tolist() == [400]
    assert table.output_tokens.tolist() == [[5, 300, 5]]
    assert table.score.tolist() == [[1.0, 0.5, 1.0]]
    assert table.predicted_output_tokens.tolist() == [[6, 280, 6]]
    assert table.predicted_score.tolist() == [[0.7, 0.4, 0.7]]
    capped = load_mixinstruct(path, EXPERTS, max_prompt_tokens=256, max_output_tokens=256)
    assert capped.prompt_tokens.tolist() == [256] and capped.output_tokens.tolist() == [[256, 5]]
    assert capped.predicted_output_tokens.tolist() == [[256, 6]]


def test_mixinstruct_fills_what_is_missing_and_says_so(tmp_path: Path):
    first = record(pred_score=0.25)
    second = record(text="")
    second["input"] = "and one\u2028lake"  # a line separator inside a text does not end the line
    path = written(tmp_path, "m.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in (first, second)))
    table = load_mixinstruct(path, EXPERTS)
    assert table.predictions_made and table.tokens_estimated
    assert table.prompt_tokens.tolist() == [5, 9]  # 3 and 6 words at 1.5 tokens
    assert table.output_tokens.tolist() == [[3, 3], [1, 3]]
    assert table.predicted_score[0, 0] == 0.25 and table.predicted_score[0, 1] != 0.5
    again = load_mixinstruct(path, EXPERTS)
    np.testing.assert_array_equal(table.predicted_score, again.predicted_score)


def test_real_answers():
    table = load_mixinstruct(real("alpacaeval_mix_train.jsonl"), ["alpaca-7b", "chatglm2-6b", "vicuna-7b"])
    assert table.output_tokens.shape == (605, 3) and table.predictions_made and not table.tokens_estimated
    np.testing.assert_allclose(table.score.mean(0), [0.6463, 0.6634, 0.6881], atol=5e-5)
    np.testing.assert_allclose(table.output_tokens.mean(0), [104.0, 240.1, 253.8], atol=0.05)
    assert table.prompt_tokens.mean() == pytest.approx(40.9, abs=0.05)
    assert (table.predicted_score - table.score).std() == pytest.approx(0.0488, rel=0.06)
    assert TableRequests.create(table).num_experts == 3
    rouge = load_mixinstruct(real("alpacaeval_mix_train.jsonl"), ["wizardlm-13b"], score="rougeL")
    assert rouge.score.mean() == pytest.approx(0.2877, abs=5e-5)


def without(key: str) -> dict[str, Any]:
    whole = record()
    del whole[key]
    return whole


def without_in_candidate(key: str) -> dict[str, Any]:
    whole = record()
    del whole["candidates"][0][key]
    return whole


BAD_ANSWERS = {
    "not JSON": ("nonsense", "line 2: not JSON"),
    "no candidates": (without("candidates"), "line 2: no 'candidates'; it has 'instruction', 'input'"),
    "candidates not a list": ({"instruction": "", "candidates": {}}, "line 2: 'candidates' must be a list"),
    "candidate not an object": ({"instruction": "", "candidates": [3]}, "line 2: each of 'candidates'"),
    "no instruction": (without("instruction"), "line 2: no 'instruction'"),
    "instruction not text": ({**record(), "instruction": 3}, "line 2: 'instruction' must be text, is 3"),
    "no model": (without_in_candidate("model"), "line 2: no 'model' in a candidate"),
    "no such expert": (
        record(model="alpaca-13b"),
        "line 2: no candidate of expert 'alpaca-7b'; it has 'alpaca-13b', '",
    ),
    "no text": (without_in_candidate("text"), "line 2: no 'text' of candidate 'alpaca-7b'"),
    "no scores": (without_in_candidate("scores"), "line 2: no 'scores' of candidate 'alpaca-7b'"),
    "scores not an object": (record(scores=[1]), "line 2: 'scores' of candidate 'alpaca-7b' must be an object"),
    "other scores": (
        record(scores={"rougeL": 1, "bertscores": 2}),
        "no score 'bertscore' of .*; it has 'bertscores', 'r",
    ),
    "NaN score": (
        record(scores={"bertscore": float("nan")}),
        "line 2: 'bertscore' of candidate 'alpaca-7b' must .*nan",
    ),
    "null score": (record(scores={"bertscore": None}), "line 2: 'bertscore' of .* None"),
    "score above 1": (record(scores={"bertscore": 71.5}), "line 2: 'bertscore' .* from 0 to 1, is 71.5"),
    "negative score": (record(scores={"bertscore": -0.1}), "line 2: 'bertscore' .* from 0 to 1"),
    "zero output tokens": (record(output_tokens=0), "line 2: 'output_tokens' of candidate 'alpaca-7b'.*is 0"),
    "zero prompt tokens": ({**record(), "prompt_tokens": 0}, "line 2: 'prompt_tokens' must .*is 0"),
    "bad predicted tokens": (record(pred_output_tokens="many"), "line 2: 'pred_output_tokens' of .*'many'"),
    "bad predicted score": (record(pred_score=[1]), "line 2: 'pred_score' of .*\\[1\\]"),
}


@pytest.mark.parametrize(("second", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_bad_answers_are_one_line(tmp_path: Path, second: Any, message: str):
    line = second if isinstance(second, str) else json.dumps(second)
    path = written(tmp_path, "answers.jsonl", json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_mixinstruct(path, EXPERTS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_arguments_for_answers(tmp_path: Path):
    path = written(tmp_path, "answers.jsonl", json.dumps(record()))
    with pytest.raises(UserError, match="no candidate of expert 'vicuna'; it has 'vicuna-7b', 'alpaca-7b'"):
        load_mixinstruct(path, ["vicuna"])
    with pytest.raises(UserError, match="no experts chosen"):
        load_mixinstruct(path, [])
    with pytest.raises(UserError, match="'max_output_tokens' must be at least 1"):
        load_mixinstruct(path, EXPERTS, max_output_tokens=0)
    with pytest.raises(UserError, match="file is empty"):
        load_mixinstruct(written(tmp_path, "empty.jsonl", ""), EXPERTS)
