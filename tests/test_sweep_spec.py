"""The file of a sweep: the trials that it stands for, and what it must not say."""

from __future__ import annotations

import io

import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxroute.commands import sweep
from jaxroute.errors import UserError
from jaxroute.sweeps.display import SweepDisplay
from jaxroute.sweeps.plan import Batch, Row, make_batches, make_groups
from jaxroute.sweeps.results import ranking, survivors
from jaxroute.sweeps.spec import load_spec
from tests.sweeping import SPEC, write_spec

PARAMETERS = SPEC["parameters"]


def test_a_grid_is_every_combination(tmp_path):
    spec = load_spec(write_spec(tmp_path / "spec.yaml"))
    assert [list(trial.values.values()) for trial in spec.trials] == [
        [rate, arrivals] for rate in (1e-3, 1e38, 1e-4) for arrivals in (3.0, 6.0)
    ]
    assert spec.trials[5].config.agent.critic_learning_rate == 1e-4
    assert spec.trials[5].config.workload.arrivals.rate == 6.0 and spec.trials[5].config.network.mlp == (8,)
    assert spec.seeds == (0, 5) and spec.rungs == (300, 600)
    assert load_spec(write_spec(tmp_path / "three.yaml", seeds=3, rungs=None)).seeds == (0, 1, 2)


def test_samples_are_drawn_within_their_ranges_and_stay_the_same(tmp_path):
    parameters = {
        "agent.gamma": {"uniform": [0.9, 0.99]},
        "agent.tau": {"log_uniform": [1e-4, 1e-1]},
        "network.mlp": {"choice": [[8], [16, 16]]},
        "training.batch_size": {"grid": [16, 32]},
    }
    path = write_spec(tmp_path / "spec.yaml", parameters=parameters, samples=100, rungs=None)
    spec, again = load_spec(path), load_spec(path)
    assert len(spec.trials) == 200 and spec == again
    values = {key: [trial.values[key] for trial in spec.trials] for key in parameters}
    assert 0.9 <= min(values["agent.gamma"]) < 0.91 and 0.98 < max(values["agent.gamma"]) <= 0.99
    assert 1e-4 <= min(values["agent.tau"]) and max(values["agent.tau"]) <= 1e-1
    assert 0.4 < np.mean(np.log10(values["agent.tau"]) < -2.5) < 0.6  # the middle on a logarithmic scale
    assert {tuple(mlp) for mlp in values["network.mlp"]} == {(8,), (16, 16)}
    assert values["training.batch_size"].count(16) == 100
    other = load_spec(write_spec(path, parameters=parameters, samples=100, sampling_seed=1, rungs=None))
    assert other.trials[0].values != spec.trials[0].values


def test_traced_keys_share_a_program_and_static_ones_do_not(tmp_path):
    parameters = PARAMETERS | {"training.batch_size": {"grid": [16, 32]}}
    spec = load_spec(write_spec(tmp_path / "spec.yaml", parameters=parameters))
    groups, _ = make_groups(spec)
    assert [len(group.inputs) for group in groups] == [6, 6]
    assert {spec.trials[number].config.training.batch_size for number in groups[1].inputs} == {32}
    assert sum(groups[0].varied) == 3  # learning rate, arrival rate of the training and of the evaluation
    batches = make_batches(spec, groups, 0, [trial.number for trial in spec.trials], {0: 5, 1: 100})
    assert [(batch.group, len(batch.rows), batch.size) for batch in batches] == [(0, 4, 4)] * 3 + [(1, 12, 12)]
    assert len({row for batch in batches for row in batch.rows}) == 24


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parameters": {"agent.gama": {"grid": [0.9]}}}, "parameters: unknown key agent.gama; nearest: agent.gamma"),
        ({"fixed": {"training.frame": 3}}, "fixed: unknown key training.frame; nearest: training.frames"),
        ({"rate": 3}, "unknown key rate; a spec has config, fixed"),
        ({"parameters": {"agent.gamma": {"grid": []}}}, "parameters.agent.gamma: grid: expected a list of one value"),
        ({"parameters": {}}, "parameters: nothing is varied"),
        ({"parameters": None}, "parameters: nothing is varied"),
        ({"parameters": {"agent.gamma": [0.9]}}, "expected one of grid, choice, uniform or log_uniform"),
        ({"parameters": {"training.batch_size": {"log_uniform": [8, 64]}}}, "static or takes no number; list values"),
        ({"parameters": {"network.kind": {"uniform": [0, 1]}}}, "static or takes no number; list values"),
        ({"parameters": {"agent.tau": {"log_uniform": [0, 1]}}}, "log_uniform: expected two numbers above 0"),
        ({"parameters": {"agent.tau": {"uniform": [1, 0]}}}, "uniform: expected two numbers, the smaller first"),
        ({"parameters": {"agent.gamma": {"grid": ["high"]}}}, "parameters: agent.gamma: expected a number above 0"),
        (
            {"parameters": {"agent.gamma": {"grid": [2.0]}}},
            "parameters: agent.gamma: expected a number above 0, at most",
        ),
        ({"parameters": {"training.seed": {"grid": [1]}}}, "training.seed is not varied in a sweep"),
        ({"fixed": {"training.frames": "many"}}, "fixed: training.frames: expected a whole number"),
        ({"fixed": [1]}, "fixed: expected keys of the configuration"),
        ({"config": "none.yaml"}, "none.yaml: cannot be read"),
        ({"config": 3}, "config: expected the path"),
        ({"seeds": 0}, "seeds: expected a whole number of 1 or more"),
        ({"seeds": [1, 1]}, "or a list of seeds, each once, got [1, 1]"),
        ({"samples": 4}, "samples: every key has a grid"),
        ({"rungs": [600]}, "rungs: the last is training.frames"),
        ({"rungs": [300, 100]}, "rungs: expected frames in rising order"),
        ({"keep": 1.0}, "keep: expected a number between 0 and 1"),
    ],
)
def test_a_spec_that_cannot_be_is_one_line(changes, message, tmp_path, capsys):
    path = write_spec(tmp_path / "spec.yaml", **changes)
    assert sweep.main([str(path), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and str(tmp_path) in err
    assert not (tmp_path / "out").exists()


def test_what_is_no_spec_or_no_folder_is_one_line(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert sweep.main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "cannot be read" in refused(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    assert "line 2: not YAML" in refused(str(tmp_path / "bad.yaml"))
    (tmp_path / "text.yaml").write_text("many")
    assert "expected keys and values" in refused(str(tmp_path / "text.yaml"))
    path = write_spec(tmp_path / "spec.yaml")
    assert "expected a whole number" in refused(str(path), "--trials-per-batch", "0")
    assert "holds something else" in refused(str(path), "--out", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text('{"spec": "0"}')
    assert "results of another spec" in refused(str(path), "--out", str(tmp_path / "out"))
    assert "cannot be written" in refused(str(path), "--out", str(path))


def rows(*values: tuple[int, int, float | None], seeds: int = 2) -> list[dict]:
    """Of (trial, rung, QoS); None diverged. Seeds are 0.1 apart."""
    return [
        {
            "trial": trial,
            "seed": seed,
            "rung": rung,
            "frames": 100 * (rung + 1),
            "diverged": qos is None,
            "qos": None if qos is None else qos + 0.1 * seed,
        }
        for trial, rung, qos in values
        for seed in range(seeds)
    ]


def test_ranking_is_by_rung_and_qos_without_what_diverged():
    table = rows((0, 0, 0.5), (1, 0, 0.7), (2, 0, None), (3, 0, 0.6), (1, 1, 0.4), (3, 1, 0.8))
    ranked = ranking(table)
    assert [place.trial for place in ranked] == [3, 1, 0] and ranked[0].qos == pytest.approx(0.85)
    # Standard deviation 0.0707 of two seeds 0.1 apart, over two trials: t(2) = 4.303.
    assert ranked[0].half_width == pytest.approx(4.303 * 0.070711 / 2**0.5, rel=1e-3)
    assert survivors(table, 0, 0.5) == [1, 3] and survivors(table, 0, 0.1) == [1]
    assert survivors(rows((0, 0, None)), 0, 0.5) == []
    assert np.isnan(ranking(rows((0, 0, 0.5), seeds=1))[0].half_width)


@pytest.mark.parametrize(("trials", "keep", "count"), [(5, 0.5, 3), (6, 0.5, 3), (1, 0.01, 1), (10, 0.31, 4)])
def test_the_display_counts_the_trials_that_go_on(tmp_path, trials, keep, count):
    parameters = {"agent.gamma": {"grid": np.linspace(0.5, 0.9, trials).tolist()}}
    spec = load_spec(write_spec(tmp_path / "spec.yaml", parameters=parameters, keep=keep))
    console = Console(width=120, record=True, file=io.StringIO())
    everyone, table = list(range(trials)), rows(*((trial, 0, trial / 100) for trial in range(trials)))
    best = survivors(table, 0, keep)
    assert best == everyone[-count:]
    with SweepDisplay(console, spec) as display:
        for rung, chosen in enumerate((everyone, best)):
            batch = [Row(trial, seed) for trial in chosen for seed in spec.seeds]
            display.finished(Batch(rung, 0, 0, batch, len(batch)), table)
    *_, before, last = console.export_text().splitlines()
    first, total = 2 * 300 * trials, 2 * 300 * (trials + count)
    assert before.startswith(f"{first:,} of {total:,} frames") and last.startswith(f"{total:,} of {total:,} frames")
    assert last.endswith(f"0:00:00 left, best trial {trials - 1}: QoS {(trials - 1) / 100 + 0.05:.4f}")


def test_the_spec_that_comes_with_it_can_be_read():
    from jaxroute.config.loader import config_folder

    path = config_folder() / "sweep.yaml"
    assert set(yaml.safe_load(path.read_text())["parameters"]) == set(load_spec(path).keys)


def test_another_spec_has_another_text(tmp_path):
    texts = {load_spec(write_spec(tmp_path / "spec.yaml", seeds=seeds)).text for seeds in (1, 2)}
    assert len(texts) == 2
    with pytest.raises(UserError, match="expected frames"):
        load_spec(write_spec(tmp_path / "spec.yaml", rungs=300))
