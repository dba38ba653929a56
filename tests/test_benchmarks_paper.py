"""The paper's experiments: the plan is whole, jobs are resumed, and tables and claims are what the evaluations say."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper import claims, jobs, plan, tables
from benchmarks.paper.plan import FULL, QUICK, Question, Setting, Training, questions
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.routers import ROUTERS

TINY = (
    "training.frames=64",
    "training.start_decisions=0",
    "training.validation_decisions=0",
    "training.num_envs=8",
    "training.batch_size=4",
    "training.buffer_capacity=64",
    "network.hidden=8",
    "network.layers=1",
    "network.heads=2",
    "network.mlp=[8]",
    "environment.slots=4",
)
RUN = Training("tiny", (*TINY, plan.RATE_RANGE), seed=0)


def tiny_setting(rate: int) -> Setting:
    overrides = (f"workload.arrivals.rate={rate}", "environment.slots=4")
    return Setting("rates", str(rate), overrides, ("round_robin",), (("trained", (RUN,)),), 2, 20)


@pytest.mark.parametrize("size", [QUICK, FULL])
def test_every_setting_of_the_plan_can_be_built(size):
    for name, question in questions(size).items():
        for setting in question.settings:
            assert setting.question == name
            assert set(setting.routers) <= set(ROUTERS)
            assert all(tables.label_of(router) for router in (*setting.routers, *dict(setting.policies)))
            for overrides in (setting.overrides, *(run.overrides for _, runs in setting.policies for run in runs)):
                if not any("{" in part for part in overrides):  # the others wait for recorded data
                    build_experiment(load_config(None, list(overrides)))


def test_a_training_name_stands_for_one_training():
    for size in (QUICK, FULL):
        runs = {}
        for question in questions(size).values():
            for setting in question.settings:
                for _, trainings in setting.policies:
                    for run in trainings:
                        assert runs.setdefault(run.folder, run) == run


@pytest.mark.slow
def test_jobs_are_done_once_and_reported(tmp_path, monkeypatch, figures):
    settings = tuple(tiny_setting(rate) for rate in (1, 2))
    assert "last QoS" in jobs.run_training(tmp_path, RUN, {})
    assert jobs.run_training(tmp_path, RUN, {}) == "kept"
    for setting in settings:
        assert jobs.run_evaluation(tmp_path, setting, {}).startswith(tuple("0123456789"))
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "evaluate_routers", lambda *_: pytest.fail("evaluated again"))
        assert jobs.run_evaluation(tmp_path, settings[0], {}).startswith("QoS trained")

    question = Question("tiny", "requests per second", settings)
    command.report({"tiny": question}, tmp_path, tmp_path)
    rows = list(csv.DictReader((tmp_path / "tiny.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2 and {row["router"] for row in rows} == {"round_robin", "trained"}
    assert all(0 <= float(row["qos"]) <= 1 for row in rows)
    assert "| Round-Robin |" in (tmp_path / "results.md").read_text()
    (axes,) = figures["tiny.png"].axes
    assert axes.get_title(loc="left") == "tiny" and axes.get_xlabel() == "requests per second"
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    for router in ("round_robin", "trained"):
        points = [(float(row["requests per second"]), float(row["qos"])) for row in rows if row["router"] == router]
        means = [(rate, np.mean([qos for at, qos in points if at == rate])) for rate in (1, 2)]
        np.testing.assert_allclose(lines[tables.label_of(router)], means, rtol=1e-5)
    # Another training of the same name is not taken for this one.
    changed = Training("tiny", (*RUN.overrides, "agent.gamma=0.5"), 0)
    assert "last QoS" in jobs.run_training(tmp_path, changed, {})


def stored(qos: dict[str, list[list[float]]]) -> dict[str, list[dict[str, list[float]]]]:
    """Evaluations of these routers: QoS by seed and episode, and other metrics that are alike."""
    return {name: [{metric: row for metric in jobs.METRICS} for row in rows] for name, rows in qos.items()}


def test_intervals_are_over_seeds_where_there_are_several():
    results = stored({"trained": [[0.7, 0.8], [0.6, 0.7], [0.8, 0.9]], "round_robin": [[0.5, 0.6]]})
    mean, half_width = tables.interval(results["trained"])
    assert mean == pytest.approx(0.75)
    assert half_width == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)  # Student's t with two degrees of freedom
    assert tables.interval(results["round_robin"]).half_width == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert tables.lead(results, "trained", "round_robin").mean == pytest.approx(0.2)


def test_claims_are_met_or_not():
    size = QUICK
    question = questions(size)["rates"]
    names = {*plan.PAPER, *plan.SERVING, *plan.PLANNING, "baseline_rl", "trained"}
    low, high = [[0.49, 0.51]], [[0.69, 0.71]] * 3
    better = {
        setting.point: stored({n: high if n == "trained" else low for n in names}) for setting in question.settings
    }
    rows = list(claims._rates(better))
    verdicts = {claim: met for claim, *_, met in rows}
    assert verdicts.pop("4/s, latency per token against Round-Robin") is False  # 0.7 of each metric against 0.5
    assert all(met in (True, None) for met in verdicts.values())
    assert next(measured for claim, _, measured, _ in rows if claim.startswith("mean over rates")) == "+40.0%"
    worse = {
        setting.point: stored({n: low if n == "trained" else high for n in names}) for setting in question.settings
    }
    assert any(met is False for *_, met in claims._rates(worse))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rate"], "unknown question 'rate'; the nearest are rates"),
        (["--jobs", "0"], "--jobs 0: expected 1 to"),
        (["rates", "--work", "/dev/null/x"], "/dev/null/x: cannot be made"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_questions_without_their_data_are_left_out(tmp_path, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command, "run_all", lambda chosen, *_: ran.extend(chosen))
    monkeypatch.setattr(command, "report", lambda *_: None)
    options = ["--quick", "--data", str(tmp_path), "--work", str(tmp_path / "work")]
    assert command.main(["rates", "text", "azure_code", *options]) == 0
    assert ran == ["rates"]
    error = capsys.readouterr().err
    assert "text: left out, no" in error and "azure_llm_2023_code.csv" in error
