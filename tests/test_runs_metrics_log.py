"""Metrics in metrics.jsonl, TensorBoard, Weights & Biases (offline) and MLflow (local), and runs that go on."""

from __future__ import annotations

import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from jaxroute.commands import train
from jaxroute.config.loader import dotted_values, load_config
from jaxroute.errors import UserError
from jaxroute.runs.loggers import check_loggers
from jaxroute.runs.metrics_log import MetricsLog

NOT_FINITE = {"frames": 10, "loss": float("nan"), "episode": {"qos": 0.5, "expert": [1.0, float("inf")]}}
WITHOUT = "the extra {} is not installed (make loggers installs it)"


def record(frames: int, loss: float) -> dict[str, Any]:
    return {"frames": frames, "seconds": frames / 10, "loss": loss, "episode": {"expert": [0.25, 0.75]}}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points(run: Path) -> dict[str, dict[int, float]]:
    """The scalars in a run's event files by tag and step, with what was purged left out as TensorBoard does."""
    tags: dict[str, dict[int, float]] = {}
    for path in sorted((run / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16  # the length, its checksum, the event, its checksum
            if event.session_log.status == SessionLog.START:
                tags = {tag: {s: v for s, v in steps.items() if s < event.step} for tag, steps in tags.items()}
            for value in event.summary.value:
                tags.setdefault(value.tag, {})[event.step] = value.simple_value
    return tags


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in the log format of LevelDB, in blocks of 32 KiB, after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little is left in the block for a record's header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def killed_and_resumed(run: Path, loggers: list[str], config: dict[str, Any], pause: float = 0.0) -> None:
    """Three records, of which the checkpoint has the first two, a line that was cut, and then two in a new process."""
    with MetricsLog(run, loggers, config) as log:
        assert log.kept == []
        for frames in (10, 20, 30):
            log.write(record(frames, 1.0 / frames))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"frames": 40, "lo')
    time.sleep(pause)
    with MetricsLog(run, loggers, config, 20) as log:
        assert log.kept == [record(10, 0.1), record(20, 0.05)]
        log.write(record(30, 1.0 / 30))
        log.write(record(40, 0.025))


def test_every_record_is_a_line_and_points(tmp_path):
    with MetricsLog(tmp_path, ["tensorboard"], {}) as log:
        logged = log.write(NOT_FINITE)
        assert lines(tmp_path) == [logged]  # before the file is closed
    assert logged == {"frames": 10, "loss": None, "episode": {"qos": 0.5, "expert": [1.0, None]}}
    assert points(tmp_path) == {"frames": {10: 10.0}, "episode/qos": {10: 0.5}, "episode/expert/0": {10: 1.0}}


def test_no_logger_at_all(tmp_path):
    with MetricsLog(tmp_path, [], {}) as log:
        log.write(NOT_FINITE)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_drops_what_came_later(tmp_path):
    killed_and_resumed(tmp_path, ["tensorboard"], {})
    assert [line["frames"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    tags = points(tmp_path)
    assert {10: 10.0, 20: 20.0, 30: 30.0, 40: 40.0} == tags["frames"]
    assert tags["loss"] == pytest.approx({10: 0.1, 20: 0.05, 30: 1 / 30, 40: 0.025})
    with MetricsLog(tmp_path, ["tensorboard"], {}, 0):  # no checkpoint had been written
        pass
    assert lines(tmp_path) == [] and not any(points(tmp_path).values())


@pytest.mark.parametrize("damage", ["", "\n", "12\n", '{"frames": null}\n', "[]\n", "\xff\n", '{"loss": 1}\n', "{"])
def test_damaged_lines_are_dropped(tmp_path, damage):
    whole = [json.dumps(record(frames, 0.5)) for frames in (10, 20)]
    (tmp_path / "metrics.jsonl").write_bytes(f"{whole[0]}\n{damage}".encode("latin-1"))
    with MetricsLog(tmp_path, [], {}, 20) as log:
        assert log.kept == [record(10, 0.5)]
        log.write(record(20, 0.5))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole


def test_a_last_line_without_its_end_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(10, 0.5)))
    with MetricsLog(tmp_path, [], {}, 10) as log:
        log.write(record(20, 0.5))
    assert [line["frames"] for line in lines(tmp_path)] == [10, 20]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert train.main([f"training.loggers=[{name}]", "--out", str(tmp_path / "run")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and f"pip install 'jaxroute[{name}]'" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[name], "__file__", None, raising=False)  # a folder of that name, as wandb leaves
    with pytest.raises(UserError, match="cannot be imported"):
        check_loggers([name])


@pytest.mark.parametrize("value", ["[tensorbord]", "wandb", "[wandb, wandb]", "null"])
def test_loggers_that_there_are_not(value):
    with pytest.raises(UserError, match="training.loggers: expected a list of tensorboard, wandb and mlflow"):
        load_config(None, [f"training.loggers={value}"])


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    package = pytest.importorskip("wandb", reason=WITHOUT.format("wandb"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield package
    package.teardown()  # it keeps its settings for the process


def test_wandb_offline(tmp_path, monkeypatch, wandb):
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "routers")
    run = tmp_path / "the-run"
    run.mkdir()
    killed_and_resumed(run, ["wandb"], dotted_values(load_config()), pause=1.1)  # its folders are named by the second
    assert wandb.run is None and not (tmp_path / "wandb").exists()
    wandb.teardown()  # waits for its files

    identities, histories = set(), []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        steps = {}
        for data in log_records(path):
            entry = record_type.FromString(data)
            if entry.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in entry.run.config.update}
                identities.add((entry.run.run_id, entry.run.project, entry.run.display_name, config["agent.tau"]))
            if entry.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item
                }
                steps[items["_step"]] = items["loss"], items["episode/expert/1"]
        histories.append(steps)
    identity = (run / "wandb_run_id").read_text().strip()
    assert identities == {(identity, "routers", "the-run", 0.01)}
    # Offline the resumed run is a second folder of the same run, which `wandb sync` adds to the first.
    assert histories == [
        {10: (0.1, 0.75), 20: (0.05, 0.75), 30: (1 / 30, 0.75)},
        {30: (1 / 30, 0.75), 40: (0.025, 0.75)},
    ]


def test_wandb_without_an_account(tmp_path, monkeypatch, wandb):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="training.loggers: wandb: .*WANDB_MODE=offline") as refused:
        MetricsLog(tmp_path, ["wandb"], {})
    assert "\n" not in str(refused.value)


def test_mlflow_local(tmp_path, capsys, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason=WITHOUT.format("mlflow"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, config = tmp_path / "the-run", dotted_values(load_config())
    run.mkdir()
    killed_and_resumed(run, ["mlflow"], config)
    assert [path.name for path in tmp_path.iterdir()] == ["the-run"]

    uri = f"sqlite:///{run / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("jaxroute")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (run / "mlflow_run_id").read_text().strip()
    assert found.info.run_name == "the-run" and found.info.status == "FINISHED"
    assert found.data.params == {key: str(value) for key, value in config.items()}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 0.025)]

    # The same database by its URI, and runs that end in other ways.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    for error, status in ((KeyboardInterrupt, "KILLED"), (UserError, "FAILED")):
        folder = tmp_path / status
        folder.mkdir()
        with pytest.raises(error), MetricsLog(folder, ["mlflow"], {}):
            raise error
        assert client.get_run((folder / "mlflow_run_id").read_text().strip()).info.status == status
        assert not (folder / "mlflow.db").exists()

    # A server that goes away costs a line, not the training; one that was never there ends it.
    folder = tmp_path / "lost"
    folder.mkdir()
    with MetricsLog(folder, ["mlflow"], {}) as log:
        client.delete_run((folder / "mlflow_run_id").read_text().strip())
        capsys.readouterr()
        log.write(record(10, 0.1))
        log.write(record(20, 0.1))
    assert capsys.readouterr().err.count("nothing more of this run is logged there") == 1 and len(lines(folder)) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(UserError, match="training.loggers: mlflow: .*check MLFLOW_TRACKING_URI"):
        MetricsLog(folder, ["mlflow"], {})
