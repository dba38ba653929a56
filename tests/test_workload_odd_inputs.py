"""Random mutations of a valid file of each format: read with the right figures, or refused in one line with code 2.

`JAXROUTE_ODD_INPUTS=500 pytest tests/test_workload_odd_inputs.py` tries 500 a format.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxroute.calibration.logs import load_log
from jaxroute.commands import calibrate, replay
from jaxroute.errors import UserError
from jaxroute.workload import load_mixinstruct, load_trace
from jaxroute.workload.reading import Reading, collect_readings
from tests.odd_inputs import ANY, Odd, odd_inputs
from tests.request_files import EXAMPLES, TIMED, Example

COUNT = int(os.environ.get("JAXROUTE_ODD_INPUTS", "50"))


def refused(path: Path, error: UserError, capsys: pytest.CaptureFixture[str], command: Any = replay) -> None:
    """The error is one line that names the file, and the command prints it and returns 2."""
    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
    capsys.readouterr()
    out = ["--out", str(path.with_name("p.yaml"))]
    assert command.main([str(path), *out]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"error: {error}\n"


def check(odd: Odd, found: tuple[np.ndarray, np.ndarray, np.ndarray], reading: Reading) -> None:
    """What was read is right, or the reading says what was assumed."""
    told = " ".join((*reading.changed, *reading.warnings))
    assert odd.figures is not None, f"must be refused, and was read: {reading.line()}"
    assert odd.says in told
    times, prompts, outputs = found
    wanted = np.asarray(odd.figures)
    assert reading.used == len(wanted) and reading.rows - sum(reading.left_out.values()) == reading.used
    whole = slice(None, -1 if odd.what == "cut in a line" else None)  # its last row may have lost digits, as is said
    np.testing.assert_allclose(times[whole] * 1000, wanted[whole, 0], rtol=1e-6, atol=1e-3)
    np.testing.assert_array_equal(prompts[whole], wanted[whole, 1])
    np.testing.assert_array_equal(outputs[whole], wanted[whole, 2])


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[f"{e.name} {i}" for i, e in enumerate(EXAMPLES)])
def test_odd_inputs_are_read_right_or_refused(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    example: Example = EXAMPLES[number]
    path, seen = tmp_path / "requests", Counter[str]()
    for odd in odd_inputs(example, COUNT, seed=number):
        path.write_bytes(odd.content)
        try:
            with collect_readings() as (readings):
                trace = load_trace(path)
        except UserError as error:
            assert odd.figures is None or odd.outcome == ANY, f"{odd.what}: {error}"
            refused(path, error, capsys)
            seen["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{odd.what}: {error!r}") from error
        else:
            try:
                check(odd, (trace.times, trace.prompt_tokens, trace.output_tokens), readings[0])
            except AssertionError as error:
                raise AssertionError(f"{odd.what}: {error}") from error
            seen["read"] += 1
    assert seen["read"] > COUNT / 10 and seen["refused"] > COUNT / 4


@pytest.mark.parametrize("name", TIMED)
def test_odd_logs_are_read_right_or_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As above with times of tokens; those of the requests that are read are the valid file's."""
    example = next(example for example in EXAMPLES if example.name == name)
    path = tmp_path / "requests"
    path.write_text(example.text(example.rows()))
    whole = load_log(path)
    lengths = zip(whole.prompt_tokens.tolist(), whole.output_tokens.tolist(), strict=True)
    known = dict(zip(lengths, zip(*whole.measured.values(), strict=True), strict=True))
    for odd in odd_inputs(example, COUNT, seed=100 + len(name)):
        if odd.what == "other unit":
            continue  # refused or warned of above; its latencies are others
        path.write_bytes(odd.content)
        try:
            with collect_readings():
                log = load_log(path)
        except UserError as error:
            refused(path, error, capsys, calibrate)
            continue
        except Exception as error:
            raise AssertionError(f"{odd.what}: {error!r}") from error
        assert log.reading is not None
        if odd.what != "cut in a line":
            check(odd, (log.arrival, log.prompt_tokens, log.output_tokens), log.reading)
        lengths = zip(log.prompt_tokens.tolist(), log.output_tokens.tolist(), strict=True)
        for request, latencies in zip(lengths, zip(*log.measured.values(), strict=True), strict=True):
            if request in known:
                np.testing.assert_allclose(latencies, known[request], atol=1e-5)


def test_odd_answers_are_read_or_refused(tmp_path: Path):
    """Recorded answers have no times; a valid one is a key more, an order, an encoding."""
    rng = np.random.default_rng(5)
    texts = ['{"instruction": "a b", "candidates": [{"model": "m", "text": "c d", "scores": {"s": 0.5}}]}\n'] * 5
    good = "".join(texts).encode()
    path = tmp_path / "answers.jsonl"
    for _ in range(4 * COUNT):
        content = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(content)))
            content[at : at + int(rng.integers(3))] = rng.choice([b"", b"\xff", b'"', b"}", b"9e999", b"null", b"\n"])
        path.write_bytes(bytes(content))
        try:
            with collect_readings():
                table = load_mixinstruct(path, ["m"], "s")
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert ((table.score >= 0) & (table.score <= 1)).all() and table.output_tokens.min() >= 1
