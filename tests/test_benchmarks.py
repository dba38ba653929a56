"""The benchmarks run, in their smallest form, and refuse what they cannot use."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import baselines, device, encoder, engine
from benchmarks.decisions import Setting, decisions_table
from benchmarks.harness import Column, table
from jaxroute.config.loader import load_config

ENTRIES = ("advance", "environment", "policy", "training", "encoder", "engine", "device", "__main__")
SMALL = ["--quick", "--repeats", "1"]
FEW = [*SMALL, "--num-envs", "2", "--experts", "2", "--slots", "4", "--steps", "5"]
TINY_AGENT = [
    "training.batch_size=4",
    "training.steps_per_chunk=2",
    "environment.penalty=off",
    "environment.slots=4",
    "network.hidden=8",
    "network.layers=1",
    "network.heads=2",
    "network.mlp=[8]",
]


def command(entry: str, *options: str) -> int:
    return importlib.import_module(f"benchmarks.{entry}").main(options)


def read(path: Path) -> dict[str, Any]:
    """The JSON, in which NaN must not stand."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path.name}")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert {"device", "cores", "python", "jax", "date", "commit", "command"} == record["machine"].keys()
    return record


@pytest.fixture(autouse=True)
def few_arrivals(monkeypatch):
    monkeypatch.setattr(baselines, "ARRIVALS", 300)


@pytest.mark.parametrize("entry", ["advance", "environment", "policy"])
def test_decisions(entry, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert command(entry, *FEW, "--json", str(path)) == 0
    record = read(path)
    (row,) = record["rows"]
    assert record["machine"]["command"].startswith(f"python -m benchmarks.{entry} --quick")
    assert row["num_envs"] == 2 and row["experts"] == 2 and row["slots"] == 4 and row["steps"] == 5
    assert 0 < row["slowest"] <= row["median"] <= row["fastest"]
    assert row["compile_seconds"] > 0 and row["state_bytes"] > 100 and row["step_bytes"] > 100
    assert row["times_python"] == pytest.approx(row["median"] / row["python_rate"])
    assert "median" in capsys.readouterr().out


@pytest.mark.slow
def test_training(tmp_path):
    path = tmp_path / "out.json"
    tiny = [*TINY_AGENT, "training.num_envs=2", "training.buffer_capacity=8", "network.kind=flat"]
    assert command("training", *SMALL, "--json", str(path), *tiny) == 0
    (row,) = read(path)["rows"]
    assert row["median"] > 0
    assert row["updates"] == pytest.approx(row["median"] / 2)
    assert row["critic_loss"] is not None, "no chunk learned"


@pytest.mark.slow
def test_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "QUEUE_NODES", ("all",))
    monkeypatch.setattr(encoder, "SETTLED_STEPS", 2)
    path = tmp_path / "out.json"
    tiny = [*TINY_AGENT, "training.num_envs=2", "training.buffer_capacity=8"]
    assert command("encoder", *SMALL, "--batches", "2", "--json", str(path), *tiny) == 0
    record = read(path)
    (row,), (training,) = record["rows"], record["training"]
    assert row["batch"] == 2 and row["queue_nodes"] == training["queue_nodes"] == "all" and row["requests"] > 0
    for kind in ("han", "han_jraph"):
        assert row[f"forward_{kind}"] > 0 and row[f"gradient_{kind}"] > 0 and training[f"frames_{kind}"] > 0
    # An expert is 13 features, a request 7 and a place in two masks; there are 3 experts with 4 slots.
    assert training["transition_bytes"] == 4 * (2 + 3 * 13 + 3 * 4 * 7) + 2 * 3 * 4 + 4 + 4 * 3 + 2


def test_engine(tmp_path, monkeypatch):
    first = engine.load_schedules()[:1]
    monkeypatch.setattr(engine, "load_schedules", lambda: first)
    path = tmp_path / "out.json"
    assert command("engine", *SMALL, "--num-engines", "2", "--json", str(path)) == 0
    (row,) = read(path)["rows"]
    assert row["way"] == "jumps"
    assert row["entries"] == pytest.approx(40 * row["median"])  # one request, 40 iterations


def test_device_extrapolates_the_papers_training(tmp_path, monkeypatch):
    trained = []

    def canned(config: Path, overrides: list[str], *_: Any, **__: Any) -> dict[str, Any]:
        trained.append(load_config(config, overrides).training)
        return {"slowest": 100.0, "median": 1000.0, "fastest": 2000.0}

    monkeypatch.setattr(device, "measure_training", canned)
    path = tmp_path / "out.json"
    options = ["--parts", "paper", "--repeats", "1", "--overrides", "training.batch_size=128"]
    assert command("device", *options, "--json", str(path)) == 0
    assert read(path)["rows"][1]["result"] == "16.7 minutes"
    (training,) = trained
    assert training.num_envs == training.updates_per_step == 32, "one update a frame"
    assert training.batch_size == 128


def test_device_reports_differences(tmp_path, monkeypatch):
    right, wrong = device.load_schedules()[0], device.load_schedules()[0]
    wrong["per_request"]["0"]["finish_time"] *= 1.001
    monkeypatch.setattr(device, "load_schedules", lambda: [right, wrong])
    path = tmp_path / "out.json"
    assert command("device", *SMALL, "--parts", "schedules", "--json", str(path)) == 1
    assert [row["result"] for row in read(path)["rows"]] == ["1 of 2 equal"] * 4


def test_suite_writes_tables_json_and_pictures(tmp_path, monkeypatch, capsys, figures):
    def canned(rollout: Any, setting: Setting, repeats: int, quick: bool) -> dict[str, Any]:
        median = 1e6 / setting.slots / setting.experts
        rates = {"slowest": 1.0, "median": median, "fastest": 3.0, "bandwidth": 1e9}
        return {**vars(setting), **rates, "event_rate": 2e6, "python_rate": 1e3}

    monkeypatch.setattr(suite, "measure_setting", canned)
    monkeypatch.setattr(suite, "measure_training", lambda *_, **__: {"event_rate": None, "python_rate": 1.0})
    monkeypatch.setattr(suite, "measure_engines", lambda *_: [{"event_rate": 1.0, "python_rate": 1.0}])
    assert command("__main__", "--out", str(tmp_path / "new")) == 0
    entries = read(tmp_path / "new" / "results.json")["entries"]
    assert entries.keys() == {"advance", "environment", "policy", "training", "engine"}
    assert {row["num_envs"] for row in entries["advance"]} >= {1, 1024, 65536}
    assert {row["experts"] for row in entries["advance"]} == {3, 6, 12}
    for name, fixed in (("experts", 48), ("slots", 6)):
        (axes,) = figures[f"cost_by_{name}.png"].axes
        lines = {line.get_label(): line.get_xydata() for line in axes.lines[::2]}
        assert list(lines) == ["advance", "environment", "event simulator"]
        for points in (lines["advance"], lines["environment"]):
            assert len(points) > 1 and axes.get_xticks().tolist() == points[:, 0].tolist()
            assert points[:, 1].tolist() == pytest.approx((fixed * points[:, 0]).tolist())
        assert set(lines["event simulator"][:, 1]) == {0.5}
        for line in axes.lines[1::2]:
            at, cost = line.get_data()
            np.testing.assert_allclose(np.divide(cost, at), cost[0] / at[0])  # in proportion
    shown = capsys.readouterr().out
    assert all(f"{entry}: " in shown for entry in entries)


def test_without_numba(monkeypatch):
    monkeypatch.setattr(baselines, "event_simulator", None)
    row = baselines.Baselines(Setting(1, experts=2).params(), 4).measure(10.0, 0.01)
    assert row["event_rate"] is None and row["times_event"] is None and row["times_python"] > 0
    assert "numba is not installed" in str(decisions_table("advance", [{**row, "bandwidth": 1e9}]).caption)


def test_table_shows_what_is_missing_as_a_dash():
    shown = table("t", [Column("a", "a"), Column("b", "b")], [{"a": float("nan")}], "")
    assert [list(column.cells) for column in shown.columns] == [["-"], ["-"]]


@pytest.mark.parametrize(
    ("entry", "options", "names"),
    [
        ("advance", ["--num-envs", "0"], "--num-envs"),
        ("environment", ["--repeats", "0"], "--repeats"),
        ("environment", ["--rates", "-1"], "--rates"),
        ("policy", ["--slots", "many"], "--slots"),
        ("policy", ["--json", "/nowhere/out.json"], "/nowhere/out.json"),
        ("engine", ["--ways", "leaps"], "leaps"),
        ("training", ["training.nmu_envs=3"], "nmu_envs"),
        ("encoder", ["--experts", "4"], "--experts"),
        ("training", ["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        ("device", ["--parts", "everything"], "everything"),
        ("__main__", ["--out", "/proc/nowhere"], "/proc/nowhere"),
        ("__main__", ["--fast"], "--fast"),
    ],
)
def test_bad_input_is_one_line(entry, options, names, capsys):
    assert command(entry, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and names in error


@pytest.mark.parametrize("entry", ENTRIES)
def test_help(entry, capsys):
    with pytest.raises(SystemExit) as done:
        command(entry, "--help")
    assert done.value.code == 0
    assert "--quick" in capsys.readouterr().out
