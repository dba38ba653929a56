"""Intervals, tables, pictures, files and run folders."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxroute.errors import UserError
from jaxroute.evaluation.pictures import learning_curve, qos_comparison
from jaxroute.evaluation.statistics import mean_interval, paired_difference
from jaxroute.evaluation.tables import ROWS, evaluation_table, write_evaluation
from jaxroute.files import whole_file
from jaxroute.runs.checkpoint import load_checkpoint, save_checkpoint
from jaxroute.runs.progress import TrainingProgress
from jaxroute.runs.run_folder import prepare_run_folder, versions

METRICS = [metric for _, metric, _, _ in ROWS]


def results(**means: float) -> dict[str, dict[str, np.ndarray]]:
    noise = np.linspace(-0.02, 0.02, 5)
    routers = {"trained": 0.70, "shortest_queue": 0.65, "bert_router": 0.40} if not means else means
    return {
        name: {
            "qos": (mean + noise).astype(np.float32),
            **{metric: np.full(5, 0.5, np.float32) for metric in METRICS},
            "expert_qos": np.full((5, 3), 0.6, np.float32),
        }
        for name, mean in routers.items()
    }


def test_interval_of_a_textbook_sample():
    # t(0.975, 9) = 2.262157; sample of mean 5.5 and standard deviation 3.027650.
    interval = mean_interval(np.arange(1, 11))
    assert interval.mean == 5.5
    assert interval.half_width == pytest.approx(2.262157 * 3.027650 / np.sqrt(10), rel=1e-6)
    assert (interval.low, interval.high) == pytest.approx((3.334149, 7.665851), abs=1e-5)


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 6))
    covered = [interval.low < 3.0 < interval.high for interval in map(mean_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def test_pairing_takes_out_what_is_common():
    common = np.array([0.0, 10.0, 20.0, 30.0])
    lead = paired_difference(common + 1.0, common)
    assert lead == (1.0, 0.0)


def test_table_shows_intervals_leads_and_missing_values():
    values = results()
    values["bert_router"]["ttft"] = np.full(5, np.nan)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(values))
    text = console.export_text()
    assert text.splitlines()[0].startswith("5 fresh episodes")
    cells = {line[1:26].strip(): line[26:].split() for line in text.splitlines()}
    assert cells["QoS per request"] == ["0.7000", "0.6500", "0.4000"]
    assert cells["± (95 %)"] == ["0.0196"] * 3
    assert cells["lead of trained"] == ["+0.0500", "+0.3000"]
    assert cells["± (95 %, paired)"] == ["0.0000", "0.0000"]
    assert cells["TTFT, ms"] == ["500.0", "500.0", "-"]
    assert all(label.strip() in cells for label, *_ in ROWS)


def test_table_without_the_trained_router():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(results(random=0.5)))
    assert "lead" not in console.export_text()


def test_evaluation_file(tmp_path):
    values = results()
    values["trained"]["ttft"][:] = np.nan
    write_evaluation(tmp_path / "evaluation.json", values, seed=7, notes=["estimated"])
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert (saved["episodes"], saved["seed"], saved["notes"]) == (5, 7, ["estimated"])
    trained, other = saved["routers"]["trained"], saved["routers"]["shortest_queue"]
    assert trained["qos"] == pytest.approx(0.7) and trained["ttft"] is None
    assert len(trained["qos_per_episode"]) == 5 and len(trained["expert_qos"]) == 3
    assert other["lead_of_trained"]["mean"] == pytest.approx(0.05)


def test_learning_curves_show_every_record_and_the_best_heuristic(tmp_path, figures):
    records = [
        {"frames": 100, "qos": 0.5, "reward": 0.4, "entropy": None, "critic_loss": None},
        {"frames": 200, "qos": 0.6, "reward": 0.5, "entropy": 1.0, "critic_loss": 0.1},
        {"frames": 300, "qos": 0.7, "reward": -0.5, "entropy": 0.5, "critic_loss": 2.0},
    ]
    learning_curve(tmp_path / "curve.png", records, results())
    panels = figures["curve.png"].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        *("QoS", "Reward", "Entropy of the policy", "Critic loss")
    ]
    for axes, key in zip(panels, ("qos", "reward", "entropy", "critic_loss"), strict=True):
        frames, values = axes.lines[0].get_data()
        assert frames.tolist() == [100, 200, 300] and not axes.texts
        np.testing.assert_array_equal(values, [np.nan if row[key] is None else row[key] for row in records])
    assert [axes.get_yscale() for axes in panels] == ["linear"] * 3 + ["log"]
    best = panels[0].lines[1]
    assert best.get_ydata()[0] == pytest.approx(0.65) and best.get_label() == "Shortest Queue First: 0.650"
    assert panels[0].get_legend() is not None and len(panels[1].lines) == 1


def test_learning_curves_before_the_first_update(tmp_path, figures):
    record = {"frames": 100, "qos": 0.5, "reward": 0.4, "entropy": None, "critic_loss": None}
    learning_curve(tmp_path / "curve.png", [record], results(trained=0.5))
    panels = figures["curve.png"].axes
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [[], [], *[["no update yet"]] * 2]
    assert len(panels[0].lines) == 1, "no heuristic, so no line"


def test_routers_are_compared_by_bars_and_leads(tmp_path, figures):
    qos_comparison(tmp_path / "qos.png", results())
    bars, leads = figures["qos.png"].axes
    assert bars.get_title(loc="left") == "QoS over 5 episodes"
    assert [label.get_text() for label in bars.get_yticklabels()] == ["BERT Router", "Shortest Queue First", "Trained"]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [0.40, 0.65, 0.70], rtol=1e-6)
    assert [text.get_text() for text in bars.texts] == ["0.400 ± 0.020", "0.650 ± 0.020", "0.700 ± 0.020"]
    ends = bars.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(ends, [[0.4 - 0.01963, 0], [0.4 + 0.01963, 0]], atol=1e-4)
    assert [text.get_text() for text in leads.texts] == ["+0.300 ± 0.000", "+0.050 ± 0.000"]
    points = np.concatenate([container.lines[0].get_xydata() for container in leads.containers])
    np.testing.assert_allclose(points, [[0.3, 0], [0.05, 1]], atol=1e-6)


@pytest.mark.parametrize("means", [{"random": 0.5}, {"trained": 0.0}])
def test_one_router_alone_has_no_lead(tmp_path, figures, means):
    qos_comparison(tmp_path / "qos.png", results(**means))
    (bars,) = figures["qos.png"].axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(list(means.values()))
    assert bars.get_xlim()[1] > max(bars.patches[0].get_width(), 1e-3)


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_the_latest_return_once_there_is_one(monkeypatch):
    monkeypatch.setattr("jaxroute.runs.progress.SECONDS_BETWEEN_LINES", -1.0)
    console = Console(width=80, record=True, file=io.StringIO())
    with TrainingProgress(console, 300) as progress:
        for frames, value in ((100, float("nan")), (200, 12.34), (300, float("nan"))):
            progress.update(frames, {"return": value, "reward": 0.5, "qos": 0.6})
    lines = console.export_text().splitlines()
    assert lines[0] == "100 frames, compiled, reward 0.500, QoS 0.600"
    assert all("return 12.3, QoS 0.600, 0:00:00 left" in line for line in lines[1:]) and len(lines) == 3


def test_run_folders_that_cannot_serve(tmp_path):
    prepare_run_folder(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_run_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_run_folder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_run_folder(tmp_path / ("long" * 100))
    with pytest.raises(UserError, match="is not empty"):
        prepare_run_folder(tmp_path)


def test_versions_name_what_numbers_depend_on():
    assert {"jaxroute", "jax", "flax", "python", "device"} <= versions().keys()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    params = {"params": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(4, np.float32)}}
    save_checkpoint(run, params)
    return run, params


def test_checkpoint_is_read_back(checkpoint):
    run, params = checkpoint
    restored = load_checkpoint(run, params)
    np.testing.assert_array_equal(restored["params"]["kernel"], params["params"]["kernel"])
    assert restored["params"]["bias"].dtype == np.float32


def test_a_checkpoint_takes_the_place_of_what_a_killed_process_left(tmp_path):
    unfinished = tmp_path / "checkpoint.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    for value in (1, 2):
        save_checkpoint(tmp_path, {"kernel": np.full(3, value, np.float32)})
    assert load_checkpoint(tmp_path, {"kernel": np.zeros(3, np.float32)})["kernel"].tolist() == [2, 2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "checkpoint.sha256"}


def test_every_cut_file_of_a_checkpoint_is_noticed(checkpoint):
    run, params = checkpoint
    files = [file for file in (run / "checkpoint").rglob("*") if file.is_file()]
    assert files
    for file in files:
        whole = file.read_bytes()
        for cut in {0, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:cut])
            with pytest.raises(UserError, match="cut short"):
                load_checkpoint(run, params)
        file.unlink()
        with pytest.raises(UserError, match="missing"):
            load_checkpoint(run, params)
        file.write_bytes(whole)


def test_checkpoints_of_another_kind(checkpoint, tmp_path):
    run, params = checkpoint
    with pytest.raises(UserError, match="holds no finished training run"):
        load_checkpoint(tmp_path, params)
    (tmp_path / "checkpoint.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="missing or unreadable"):
        load_checkpoint(tmp_path, params)
    (tmp_path / "checkpoint.sha256").write_text("")
    with pytest.raises(UserError, match="cut short"):
        load_checkpoint(tmp_path, params)
    wider = {"params": {"kernel": np.zeros((3, 5), np.float32), "bias": np.ones(4, np.float32)}}
    with pytest.raises(UserError, match="another configuration"):
        load_checkpoint(run, wider)
    with pytest.raises(UserError, match="another configuration"):
        load_checkpoint(run, {"params": {"kernel": params["params"]["kernel"]}})
