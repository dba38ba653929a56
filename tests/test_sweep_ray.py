"""The same sweep as tasks of a Ray cluster on this machine (`make compat`, set ray)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.killing import WORKER
from tests.sweeping import finished_sweep, parts, start_sweep, table, write_spec

pytest.importorskip("ray", reason="Ray is of the extra ray; tests/compat.sh ray runs this")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    return write_spec(tmp_path_factory.mktemp("spec") / "small.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, spec) -> Path:
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    return finished_sweep(folder, cache, spec)


def workers() -> list[int]:
    """Processes that run a batch."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::_task"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_two_workers_give_the_same_table(whole, spec, cache, tmp_path):
    folder = tmp_path / "sweep"
    process = start_sweep(folder, cache, str(spec), "--trials-per-batch", "3", "--ray")
    most = 0
    while process.poll() is None:
        most = max(most, len(workers()))
        time.sleep(0.05)
    assert process.returncode == 0, folder.with_suffix(".log").read_text()
    assert table(folder) == table(whole) and most == min(2, os.cpu_count() or 1)


def test_killed_workers_cost_their_unfinished_chunks(whole, spec, cache, tmp_path):
    """A worker is killed at each point; Ray starts its task again, which goes on from the last state."""
    folder = tmp_path / "sweep"
    arguments = (str(spec), "--trials-per-batch", "3", "--ray")
    process = start_sweep(folder, cache, *arguments, meeting=("in its workers", "SIGKILL"))
    assert process.wait() == 0, folder.with_suffix(".log").read_text()
    assert {path.name for path in (tmp_path / "deaths").iterdir()} == set(WORKER)
    assert table(folder) == table(whole) and parts(folder) == parts(whole)


def test_no_cluster_is_one_line(spec, cache, tmp_path):
    folder = tmp_path / "sweep"
    process = start_sweep(folder, cache, str(spec), "--trials-per-batch", "3", "--ray", "127.0.0.1:1")
    assert process.wait() == 2
    assert "no cluster answers" in folder.with_suffix(".log").read_text().splitlines()[-1]
