"""Suites: the description is frozen, a run is what its parts are alone, a kill loses none, and columns can be added."""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxroute
from jaxroute.commands import suite as command
from jaxroute.commands.evaluate import decisions
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.statistics import paired_difference
from jaxroute.evaluation.tuning import Tuning
from jaxroute.routers import ROUTERS, make_router
from jaxroute.suites.description import SUITES
from jaxroute.suites.report import learners, tables
from jaxroute.suites.results import Results, read_results
from tests.compiling import ROOT, compile_fast
from tests.suiting import POINTS, TINY, parts
from tests.test_train import records, refused

NEWEST = list(SUITES.values())[-1]
CHANGED = "a version of a suite never changes; give what is new another name"


# The description


V1, V2 = jaxroute.suite("routing-v1"), jaxroute.suite("routing-v2")
KNOWN = {
    "routing-v1": "17e646a36b46e1cfc9bdda9d766cbdbbe457b8ff8f496d6b470ffd04a3fc319b",
    "routing-v2": "8e4905bde6c65a1107048d426d5893326058000d4a1435c15dc90e7f425e91d0",
}
_OF_V1 = {
    "paper-3": "890ccdf3d8c7d1dc",
    "paper-6": "8c26cb014d0103b1",
    "overload-3": "a46b344b1902669a",
    "bursts-3": "e2f5454c8a039d71",
    "slowdown-3": "2c0e81536d101891",
    "failure-3": "e390200995a39f6f",
    "quality-3": "a0415b00bc487fef",
    "rtx4090-3": "8efb98800fcf1950",
    "a100-3": "cfa710a52a5f3174",
    "mixed-3": "23bf53f34519a567",
    "measured-3": "403f80409ed7a274",
    "memory-3": "3bb6369495c2df82",
    "memory-6": "afc9dedddf33f20c",
    "long-prompts-3": "7c54730dad8ae254",
}
ENVIRONMENTS = {
    "routing-v1": _OF_V1,
    "routing-v2": {
        **_OF_V1,
        "chat-3": "b7989102f80bcffc",
        "documents-3": "21a1bc723a0ce075",
        "agents-3": "86c427ed6fc404ef",
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_version_is_what_it_was(name: str):
    suite = jaxroute.suite(name)
    assert suite.digest == KNOWN[name], CHANGED
    assert suite.evaluation.number >= 2 and len({suite.selection.seed, suite.evaluation.seed, suite.short.seed}) == 3
    assert set(SUITES) - {"tiny"} == set(KNOWN) and set(suite.environments) == set(ENVIRONMENTS[name])


@pytest.mark.parametrize(("name", "environment"), [(name, one) for name in KNOWN for one in SUITES[name].environments])
def test_its_environments_are_what_they_were(name: str, environment: str):
    """Their settings, and all numbers of their parameters to six digits."""
    suite = jaxroute.suite(name)
    env, params = suite.make(environment, suite.evaluation)
    numbers = {
        jax.tree_util.keystr(path): [f"{number:.6g}" for number in np.asarray(leaf, float).ravel()]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    text = json.dumps([env.num_experts, env.slots, env.episode_length, env.drop, numbers])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == ENVIRONMENTS[name][environment], CHANGED


def test_all_experts_of_routing_v2_are_as_vllm_serves_today():
    for name in V2.environments:
        engines = V2.make(name, V2.evaluation)[1].engines
        assert engines.enable_prefix_caching and engines.async_scheduling
        assert bool(engines.prefix_pieces) == (name not in V1.environments)


def test_the_newest_has_every_environment_without_files_and_chance():
    assert set(NEWEST.environments) == set(jaxroute.environments()) - {"azure", "cluster", "random-cluster"}
    with pytest.raises(UserError, match="unknown suite 'routing-v9'; the nearest are routing-v2, routing-v1"):
        jaxroute.suite("routing-v9")


@pytest.mark.parametrize("name", KNOWN)
def test_its_trainings_keep_to_its_budget(name: str):
    suite = jaxroute.suite(name)
    for changes in suite.trained.values():
        assert decisions(load_config(None, changes).training) <= suite.decisions
    assert {suite.index_rule, *suite.rules, *suite.untuned, suite.ceiling} <= set(ROUTERS)


def test_the_function_stays_a_function_when_the_module_is_imported():
    program = "import jaxroute.suite; print(jaxroute.suite('routing-v1').name)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "routing-v1\n"


# A run


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suites") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "tiny", TINY)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert command.main(["tiny", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_run_leaves_results_a_table_and_a_picture(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("leads.png", "parts", "results.json", "suite.json", "table.md", "trainings"),
    }
    results = read_results(whole / "results.json", TINY)
    assert set(results.columns) == set(TINY.columns)
    for name, column in results.columns.items():
        assert list(column) == list(TINY.environments)
        for sets in column.values():
            runs = {kind: np.shape(runs) for kind, runs in sets.items()}
            wanted = {"short": (2 if name in TINY.trained else 1, 3)}
            assert runs == (wanted if name == "ceiling" else wanted | {"evaluation": wanted["short"]})
    table = (whole / "table.md").read_text()
    assert table == tables(results)
    for environment in TINY.environments:
        assert table.count(f"| {environment} |") == 3


@pytest.mark.slow
def test_a_part_is_the_router_alone(whole):
    part = parts(whole)
    rules, index = part["overload-3/rules"], part["overload-3/index_rule"]
    assert (
        set(index["parameters"]) == set(ROUTERS["index_rule"].ranges)
        and index["parameters"] == rules["parameters"]["index_rule"]
    )
    env, params = jaxroute.make("overload-3", episode_length=30, engine="vllm-0.19")
    router = make_router("index_rule", env, **index["parameters"])
    alone = evaluate_routers(env, params, {"one": router}, 3, 10)["one"]["qos"]
    np.testing.assert_allclose(index["qos"]["evaluation"], [alone], rtol=1e-6)
    selected = evaluate_routers(env, params, {"one": router}, 3, 20)["one"]["qos"].mean()
    assert rules["selection_qos"]["index_rule"] == pytest.approx(float(selected), rel=1e-6)
    others = {name: rules["selection_qos"][name] for name in TINY.rules}
    assert (
        rules["best_other_rule"] == max(others, key=others.__getitem__) == part["overload-3/best_other_rule"]["router"]
    )
    best = "best_other_rule" if max(others.values()) > rules["selection_qos"]["index_rule"] else "index_rule"
    assert rules["best_rule"] == best
    # Each seed is another training, and its evaluation is that of `jaxroute train`.
    runs = [whole / "trainings" / "paper-3" / f"trained-{seed}" for seed in TINY.seeds]
    assert records(runs[0]) != records(runs[1])
    for seed, run in zip(TINY.seeds, runs, strict=True):
        alone = json.loads((run / "evaluation.json").read_text())["routers"]["trained"]["qos_per_episode"]
        assert part[f"paper-3/trained-{seed}"]["qos"]["evaluation"] == [alone]


@pytest.mark.slow
def test_killed_at_every_point_it_ends_with_the_same_results(whole, tmp_path):
    """Each process goes on from where the one before was killed, and the last is left to end."""
    folder, log = tmp_path / "suite", tmp_path / "log"
    program = [sys.executable, "-m", "tests.suiting"]
    arguments = ["tiny", "--environments", "paper-3", "--seeds", "4", "--out", str(folder)]
    settings = compile_fast() | {"JAX_PLATFORMS": "cpu"}
    wanted = {
        name: part for name, part in parts(whole).items() if name.startswith("paper-3/") and not name.endswith("-0")
    }
    for name in POINTS:
        with log.open("w") as output:
            process = subprocess.run(
                [*program, name, "SIGKILL", *arguments], cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT
            )
        assert process.returncode == -signal.SIGKILL, f"{name}: {log.read_text()}"
        same(parts(folder), {part: wanted[part] for part in parts(folder)})
    assert len(parts(folder)) == len(wanted)
    assert command.main(arguments) == 0
    same(parts(folder), wanted)
    assert not [path for path in folder.rglob("*.partial")]
    assert list(read_results(folder / "results.json").columns["trained"]) == ["paper-3"]


def same(parts: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The programs of another process may be compiled otherwise, and round otherwise."""
    assert jax.tree.structure(parts) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(wanted), strict=True):
        assert one == other if isinstance(one, str) else one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_column_of_ones_own(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "results.json").write_text((whole / "results.json").read_text())
    column = TINY.evaluate(lambda env, params: make_router("random", env), ["paper-3"])
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"suite": "tiny", "dynamics_version": DYNAMICS_VERSION, "columns": {"mine": column}}))
    assert command.main(["tiny", "--add", str(file), "--out", str(folder)]) == 0
    results = read_results(folder / "results.json")
    env, params = jaxroute.make("paper-3", episode_length=30, engine="vllm-0.19")
    alone = evaluate_routers(env, params, {"one": make_router("random", env)}, 3, 10)["one"]["qos"]
    np.testing.assert_allclose(results.qos("mine", "paper-3"), alone, rtol=1e-6)
    assert results.qos("mine", "overload-3") is None and learners(results) == [
        "trained",
        "baseline_rl",
        "random",
        "mine",
    ]
    assert f"| {alone.mean():.4f} ± " in (folder / "table.md").read_text()


@pytest.mark.slow
def test_added_columns_stay_when_the_suite_goes_on(whole, capsys):
    column = {"paper-3": {"evaluation": [[0.5, 0.6, 0.7]]}}
    read_results(whole / "results.json").with_columns({"mine": column}).write(whole / "results.json")
    capsys.readouterr()
    assert command.main(["tiny", "--out", str(whole)]) == 0
    assert "18 parts, 18 of them finished" in capsys.readouterr().out
    assert read_results(whole / "results.json").columns["mine"] == column


def test_the_best_other_rule_is_tuned_as_long_as_the_index_rule(monkeypatch):
    """And is chosen before that, on the selection's episodes."""
    suite = replace(TINY, rules=("shortest_queue", "score_minus_load", "llm_d"))
    qos = {"index_rule": 0.6, "shortest_queue": 0.5, "score_minus_load": 0.55, "llm_d": 0.4}
    budgets: list[tuple[tuple[str, ...], int]] = []

    def tune(env: Any, params: Any, names: Any, *, decisions: int, done: Any) -> dict[str, Tuning]:
        assert env.episode_length == suite.evaluation.length
        budgets.append((tuple(names), decisions))
        if len(budgets) == 3:
            qos.update(score_minus_load=0.7, llm_d=0.8)
        weights = {"score_minus_load": {"weight": decisions / 1e5}}
        return {name: Tuning(weights.get(name, {}), None, 0, 0.0) for name in names}

    def evaluate(env: Any, params: Any, routers: dict[str, Any], episodes: int, seed: int) -> Any:
        assert (episodes, env.episode_length, seed) == suite.selection
        return {name: {"qos": np.array([qos[name]])} for name in routers}

    monkeypatch.setattr(command, "tune_routers", tune)
    monkeypatch.setattr(command, "evaluate_routers", evaluate)
    rules = command._rules(replace(suite, decisions=1200, rule_decisions=800), "paper-3", Console())
    assert budgets == [(("index_rule",), 1200), (suite.rules, 800), (("score_minus_load",), 1200)]
    assert rules["parameters"]["score_minus_load"] == {"weight": 0.012}
    assert rules["best_other_rule"] == "score_minus_load" and rules["best_rule"] == "best_other_rule"


# Results


def results_of(**runs: list[list[float]]) -> Results:
    """Of one environment, the same on both sets of episodes; the best rule is the index rule."""
    columns = {
        name: {"paper-3": {"short": own} if name == "ceiling" else {"evaluation": own, "short": own}}
        for name, own in runs.items()
    }
    return Results(TINY, {"paper-3": "index_rule"}, columns)


def test_leads_are_paired_and_shares_are_of_the_gap():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.4, 0.8, 3)
    rule, ceiling = hard, hard + 0.1
    runs = hard + [[0.04], [0.06]] + rng.normal(0, 0.01, (2, 3))
    results = results_of(trained=runs.tolist(), index_rule=[rule.tolist()], ceiling=[ceiling.tolist()])
    assert results.lead("trained", "paper-3") == paired_difference(runs.mean(0), rule)
    assert results.worst_lead("trained", "paper-3") == pytest.approx((runs[0] - rule).mean())
    assert results.share("trained", "paper-3") == pytest.approx((runs.mean() - rule.mean()) / 0.1)
    assert results.share("index_rule", "paper-3") == 0 and results.lead("ceiling", "paper-3") is None
    assert results.lead("trained", "overload-3") is None and results.lead("nobody", "paper-3") is None
    without_gap = results_of(trained=runs.tolist(), index_rule=[rule.tolist()], ceiling=[rule.tolist()])
    assert without_gap.share("trained", "paper-3") is None and "| - |" in tables(without_gap)


def test_the_picture_has_a_point_for_each_learner(figures, tmp_path):
    from jaxroute.suites.report import write_report

    results = results_of(
        trained=[[0.52, 0.63, 0.74]],
        index_rule=[[0.5, 0.6, 0.7]],
        best_other_rule=[[0.4, 0.5, 0.6]],
        baseline_rl=[[0.1, 0.1, 0.1]],
    )
    write_report(tmp_path, results)
    (figure,) = figures.values()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["paper-3"]
    assert {text.get_text() for text in axes.texts} == {"+5.0 ± 4.1", "-83.3 ± 41.4"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trained", "baseline_rl"]
    assert axes.get_xlim()[0] > -30


GOOD = {
    "suite": "tiny",
    "dynamics_version": DYNAMICS_VERSION,
    "columns": {"mine": {"paper-3": {"evaluation": [[0.5, 0.6, 0.7]]}}},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.pop("columns"), "needs suite, dynamics_version and columns"),
        (
            lambda tree: tree.update(suite="routing-v0"),
            "unknown suite 'routing-v0'; the nearest are routing-v2, routing-v1",
        ),
        (lambda tree: tree.update(suite="routing-v1"), "has results of routing-v1, not of tiny"),
        (lambda tree: tree.update(dynamics_version=1), f"dynamics version 1, this package has {DYNAMICS_VERSION}"),
        (lambda tree: tree.update(columns=[]), "columns: must be a mapping"),
        (lambda tree: tree["columns"].update(mine={"papr-3": {}}), "columns.mine.papr-3: unknown environment 'papr-3'"),
        (lambda tree: tree["columns"]["mine"]["paper-3"].update(long=[]), "unknown set of episodes 'long'"),
        (lambda tree: tree["columns"]["mine"]["paper-3"].update(evaluation=[[0.5]]), "the QoS of 3 episodes"),
        (lambda tree: tree["columns"]["mine"]["paper-3"].update(evaluation=[]), "paper-3.evaluation: must be a list"),
        (lambda tree: tree["columns"]["mine"]["paper-3"].update(evaluation=[[0.5, "a", 1]]), "the QoS of 3 episodes"),
        (lambda tree: tree["columns"].update(trained={}), "column trained is one of tiny's own"),
    ],
)
def test_a_bad_column_is_one_clear_line(tmp_path, capsys, change, words):
    tree = copy.deepcopy(GOOD)
    change(tree)
    (tmp_path / "results.json").write_text(json.dumps(GOOD))
    (tmp_path / "mine.json").write_text(json.dumps(tree))
    line = refused(capsys, command.main, "tiny", "--add", tmp_path / "mine.json", "--out", tmp_path)
    assert words in line and "mine.json: " in line
    assert json.loads((tmp_path / "results.json").read_text()) == GOOD
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "results.json"}


def test_unreadable_results_are_one_clear_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert "results.json: line 1: not JSON" in refused(capsys, command.main, "tiny", "--add", "x", "--out", tmp_path)
    assert "cannot be read" in refused(capsys, command.main, "tiny", "--add", "x", "--out", tmp_path / "none")


def test_what_is_unknown_or_elsewhere_is_one_clear_line(tmp_path, capsys):
    assert "unknown suite 'tny'; the nearest are tiny" in refused(capsys, command.main, "tny")
    line = refused(capsys, command.main, "tiny", "--environments", "paper-3,papr-6", "--out", tmp_path / "a")
    assert "unknown environment of tiny 'papr-6'; the nearest are paper-3" in line
    assert "unknown seed of tiny '7'" in refused(
        capsys, command.main, "tiny", "--seeds", "0,7", "--out", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert "holds something else" in refused(capsys, command.main, "tiny", "--out", tmp_path)
    for key, words in (
        ("suite", "of another suite"),
        ("dynamics_version", "of dynamics version None"),
        ("configuration", "another default configuration"),
    ):
        folder = tmp_path / key
        folder.mkdir()
        stamp = {"suite": TINY.digest, "dynamics_version": DYNAMICS_VERSION, "configuration": "other"}
        del stamp[key]
        (folder / "suite.json").write_text(json.dumps(stamp))
        assert words in refused(capsys, command.main, "tiny", "--out", folder)
