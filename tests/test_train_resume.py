"""A training that was stopped, or killed at any point, goes on to the numbers of one that was not, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxroute.commands import train
from jaxroute.errors import UserError
from jaxroute.runs.training_state import TrainingStates, newest_state
from tests.compiling import ROOT, compile_fast
from tests.killing import TRAINING
from tests.test_train import TINY, records, refused

# The flat network is compiled in half the time; what is saved of the other is a tree like it.
LONGER = [
    *TINY,
    "training.frames=600",
    "training.checkpoint_seconds=0",
    "training.checkpoints_kept=1",
    "network.kind=flat",
    "evaluation.routers=[trained, round_robin]",
]


def start(log: Path, cache: Path, *program: str) -> subprocess.Popen:
    """A process with its output in the file `log`."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *program]
    with log.open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=compile_fast() | settings, stdout=output, stderr=subprocess.STDOUT
        )


def goes_on(run: Path) -> list[str]:
    return ["--resume", str(run)] if run.exists() else [*LONGER, "--out", str(run)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    log = folder.with_suffix(".log")
    assert start(log, cache, "jaxroute.train", *goes_on(folder)).wait() == 0, log.read_text()
    return folder


def same_results(run: Path, whole: Path) -> None:
    assert records(run) == records(whole)
    assert (run / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    assert len(records(run)) == 6
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        ours, theirs = (checkpointer.restore(folder / "checkpoint") for folder in (run, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_killed_at_every_point_it_ends_with_the_same_numbers(whole, cache, tmp_path):
    """Each process goes on from where the one before was killed, and the last is left to end."""
    run, log = tmp_path / "run", tmp_path / "log"
    for name in TRAINING:
        process = start(log, cache, "tests.killing", name, "SIGKILL", "train", *goes_on(run))
        assert process.wait() == -signal.SIGKILL, f"{name}: {log.read_text()}"
        logged = records(run) if (run / "metrics.jsonl").exists() else []
        assert logged == records(whole)[: len(logged)], name
    assert start(log, cache, "jaxroute.train", *goes_on(run)).wait() == 0, log.read_text()
    assert "is finished" in log.read_text()
    same_results(run, whole)


@pytest.mark.slow
def test_signals_stop_it_after_a_chunk(whole, cache, tmp_path, capsys):
    run, log = tmp_path / "run", tmp_path / "log"
    for chunks, number in enumerate((signal.SIGINT, signal.SIGTERM), start=1):
        process = start(log, cache, "tests.killing", "a chunk trained", number.name, "train", *goes_on(run))
        assert process.wait() == 128 + number, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert f"stopped after frame {100 * chunks}; go on: jaxroute train --resume {run}" in last
        assert "jaxroute evaluate" in last and records(run) == records(whole)[:chunks]
    assert start(log, cache, "jaxroute.train", *goes_on(run)).wait() == 0, log.read_text()
    same_results(run, whole)
    assert train.main(["--resume", str(run)]) == 0
    assert "is finished" in capsys.readouterr().out


def tree(value: float) -> dict:
    return {"weights": jnp.full(3, float(value)), "key": jax.random.key(int(value)), "steps": jnp.int32(value)}


def test_the_last_states_are_kept_and_damaged_ones_passed_over(tmp_path):
    example = jax.eval_shape(lambda: tree(0.0))
    assert newest_state(tmp_path, example) == (0, None, [])
    with TrainingStates(tmp_path, seconds=0, kept=2) as states:
        for frames in (10, 20, 30):
            states.save(frames, tree(frames))
    folder = tmp_path / "training_state"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "frames-000000000020",
        "frames-000000000030",
    ]
    frames, state, notes = newest_state(tmp_path, example)
    assert (frames, notes) == (30, []) and jnp.all(state["weights"] == 30) and state["steps"] == 30
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(jax.random.key(30)).tolist()

    (folder / "frames-000000000040").mkdir()  # a write that was killed
    newest = folder / "frames-000000000030"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    frames, state, notes = newest_state(tmp_path, example)
    assert frames == 20 and len(notes) == 1 and "frames-000000000030" in notes[0] and "cut short" in notes[0]

    with TrainingStates(tmp_path, seconds=0, kept=2) as states:
        states.save(30, tree(30))
        states.save(35, tree(35))
    assert newest_state(tmp_path, example)[0] == 35
    assert len(list(folder.iterdir())) == 4  # two states with their checksums, and nothing of the killed write

    with pytest.raises(UserError, match="another"):
        newest_state(tmp_path, {**example, "weights": jax.ShapeDtypeStruct((4,), jnp.float32)})
    for path in folder.glob("*/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=f"remove {folder} to start anew"):
        newest_state(tmp_path, example)


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    with TrainingStates(tmp_path, seconds=0, kept=1) as states:
        state = jnp.arange(1e6)
        states.offer(1, {"x": state})
        overwrite(state)
    _, state, _ = newest_state(tmp_path, {"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(state["x"], np.arange(1e6, dtype=np.float32))


def test_what_cannot_be_resumed_is_one_line(tmp_path, capsys):
    assert "has no config.yaml" in refused(capsys, train.main, "--resume", tmp_path / "none")
    assert "leave the other arguments out" in refused(capsys, train.main, "--resume", tmp_path, "agent.gamma=0.9")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxroute.runs.training_state.save_arrays", full)
    with TrainingStates(tmp_path, seconds=0, kept=1) as states:
        states.offer(10, tree(10))
        with pytest.raises(UserError, match="cannot be written .*No space left.*--resume"):
            states.wait()
