"""The commands train and evaluate, from end to end on a few frames, and what they refuse."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxroute.commands import evaluate, train
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_saved_config
from jaxroute.runs.checkpoint import load_params
from jaxroute.runs.progress import TrainingProgress

TINY = [
    "training.frames=200",
    "training.num_envs=4",
    "training.buffer_capacity=400",
    "training.batch_size=16",
    "training.steps_per_chunk=25",
    "training.start_decisions=960",
    "training.improvement_decisions=1",
    "training.validation_decisions=60",
    "training.validations=2",
    "evaluation.routers=[trained,round_robin,shortest_queue,bert_router,random]",
    "agent.warmup_frames=100",
    "environment.episode_length=30",
    "environment.slots=8",
    "environment.penalty=off",
    "network.hidden=8",
    "network.layers=1",
    "network.heads=2",
    "network.mlp=[8]",
    "evaluation.episodes=3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert train.main([*TINY, "--seed", "3", "--out", str(folder)]) == 0
    return folder


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def refused(capsys, main, *arguments: str) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.slow
def test_a_run_folder_holds_everything(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoint",
        "checkpoint.sha256",
        "config.yaml",
        "evaluation.json",
        "learning_curve.png",
        "metrics.jsonl",
        "qos.png",
        "search.jsonl",
        "tensorboard",
        "versions.json",
    }
    assert load_saved_config(run / "config.yaml").training.seed == 3
    assert json.loads((run / "versions.json").read_text())["seed"] == 3
    assert [record["frames"] for record in records(run)] == [100, 200]
    assert records(run)[0]["critic_loss"] is None and records(run)[1]["critic_loss"] > 0
    assert 0 < records(run)[1]["episode"]["qos"] < 1
    routers = json.loads((run / "evaluation.json").read_text())["routers"]
    assert list(routers) == ["trained", "round_robin", "shortest_queue", "bert_router", "random"]
    assert all(len(router["qos_per_episode"]) == 3 for router in routers.values())
    assert routers["round_robin"]["drop_rate"] == 0


@pytest.mark.slow
def test_same_seed_same_numbers(run, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert train.main([*TINY, "--seed", "3", "--out", str(again)]) == 0
    assert train.main([*TINY, "--seed", "4", "--out", str(other)]) == 0
    assert records(again) == records(run) != records(other)
    first, same, different = (json.loads((path / "evaluation.json").read_text()) for path in (run, again, other))
    assert same == first
    # Another training meets the same requests in its evaluation.
    assert different["routers"]["random"]["qos_per_episode"] == first["routers"]["random"]["qos_per_episode"]


@pytest.mark.slow
def test_whole_queues_on_the_jraph_path(tmp_path):
    """Trained and evaluated; the dense path takes the checkpoint."""
    folder = tmp_path / "graphs"
    changes = [
        "network.kind=han_jraph",
        "environment.queue_nodes=all",
        "evaluation.routers=[trained]",
        "training.start_decisions=0",  # both are others' subjects, and take longer to compile than the training
        "training.validation_decisions=0",
    ]
    assert train.main([*TINY, *changes, "--out", str(folder)]) == 0
    assert records(folder)[1]["critic_loss"] > 0
    routers = json.loads((folder / "evaluation.json").read_text())["routers"]
    assert 0 < np.mean(routers["trained"]["qos_per_episode"]) < 1
    dense = build_experiment(load_saved_config(folder / "config.yaml", ["network.kind=han"]))
    params = load_params(folder, dense.network, dense.env, dense.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_evaluate_repeats_the_evaluation(run, capsys, monkeypatch):
    results = []
    compare = evaluate.compare
    monkeypatch.setattr(
        evaluate, "build_experiment", lambda config: build_experiment(config)._replace(notes=["predictions are made"])
    )
    monkeypatch.setattr(evaluate, "compare", lambda *inputs: results.append(compare(*inputs)) or results[-1])
    assert evaluate.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "note: predictions are made" in out and "3 fresh episodes" in out
    saved = json.loads((run / "evaluation.json").read_text())["routers"]
    for name, values in results[0].items():
        np.testing.assert_allclose(values["qos"], saved[name]["qos_per_episode"], rtol=1e-6)
    names = ["trained", "power_of_two", "score_minus_load"]
    assert evaluate.main([str(run), "--episodes", "2", "--seed", "5", "--routers", ",".join(names)]) == 0
    assert list(results[1]) == names and len(results[1]["trained"]["qos"]) == 2
    assert "tuned score_minus_load: weight=" in capsys.readouterr().out
    assert evaluate.main([str(run), "--routers", "round-robin"]) == 2
    assert "unknown router in evaluation.routers 'round-robin'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_can_be_evaluated(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "run"
    monkeypatch.setattr(TrainingProgress, "update", interrupt)
    assert train.main([*TINY, "--out", str(folder)]) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stopped after frame 100; go on" in error and str(folder) in error
    assert len(records(folder)) == 1
    assert evaluate.main([str(folder)]) == 0


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_metrics_alone(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*TINY, "agent.critic_learning_rate=1e38", "--out", str(folder)]) == 2
    assert "diverged before frame 200" in capsys.readouterr().err
    assert len(records(folder)) == 2 and not (folder / "checkpoint").exists()


@pytest.mark.slow
def test_evaluate_refuses_a_damaged_run(run, capsys):
    largest = max((run / "checkpoint").rglob("*"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in refused(capsys, evaluate.main, run)
    largest.write_bytes(whole)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config[: len(config) // 2])
    assert "config.yaml" in refused(capsys, evaluate.main, run)
    (run / "config.yaml").write_text(config.replace("hidden: 8", "hidden: 16"))
    assert "another configuration" in refused(capsys, evaluate.main, run)
    (run / "config.yaml").write_text(config)


def test_evaluate_refuses_what_is_no_run(tmp_path, capsys):
    assert "no config.yaml" in refused(capsys, evaluate.main, tmp_path)
    assert "no config.yaml" in refused(capsys, evaluate.main, tmp_path / "nothing")


def test_train_refuses_before_it_makes_a_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert "nearest: agent.gamma" in refused(capsys, train.main, "agent.gama=1", "--out", out)
    assert "none.yaml" in refused(capsys, train.main, "--config", tmp_path / "none.yaml", "--out", out)
    assert "training.seed" in refused(capsys, train.main, "--seed", "-1", "--out", out)
    trace = ["workload.arrivals.kind=trace", f"workload.arrivals.path={tmp_path / 'none.csv'}"]
    assert "none.csv" in refused(capsys, train.main, *trace, "--out", out)
    assert not out.exists()


def test_train_refuses_folders_that_cannot_serve(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, train.main, "--out", tmp_path / "file")
    assert "cannot be written" in refused(capsys, train.main, "--out", tmp_path / "file" / "run")
    assert "is not empty" in refused(capsys, train.main, "--out", tmp_path)
