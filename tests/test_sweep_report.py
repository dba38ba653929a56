"""The pictures of a sweep: what stands in its table and its curves."""

from __future__ import annotations

import numpy as np
import pytest

from jaxroute.sweeps.report import curves_picture, effects_picture
from jaxroute.sweeps.results import ranking
from jaxroute.sweeps.spec import load_spec
from tests.sweeping import write_spec

PARAMETERS = {
    "agent.critic_learning_rate": {"grid": [1e-4, 1e-2]},
    "agent.gamma": {"grid": [0.9]},
    "network.mlp": {"choice": [[8], [16, 16]]},
    "agent.tau": {"uniform": [0.1, 0.2]},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A spec of 40 trials, of which the last diverged, and its rows; QoS is the trial's number over 100, seeds 0.02
    apart."""
    path = write_spec(tmp_path_factory.mktemp("spec") / "spec.yaml", parameters=PARAMETERS, samples=20, rungs=None)
    spec = load_spec(path)
    rows = [
        {
            "trial": trial.number,
            "seed": seed,
            "rung": 0,
            "frames": 600,
            "diverged": trial.number == 39,
            "qos": None if trial.number == 39 else trial.number / 100 + 0.02 * place,
            **trial.values,
        }
        for trial in spec.trials
        for place, seed in enumerate(spec.seeds)
    ]
    return spec, rows


def test_effects_are_dots_and_their_means(sweep, tmp_path, figures):
    spec, rows = sweep
    # What only one trial reached is no effect of a key.
    effects_picture(tmp_path / "effects.png", spec, [*rows, {**rows[0], "rung": 1, "qos": 0.9}])
    figure = figures["effects.png"]
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(figure.axes) == 6 and [axes.get_title(loc="left") for axes in shown] == list(PARAMETERS)
    assert figure._suptitle.get_text().startswith("Effect of each key after 600 frames")
    ranked = [row for row in rows if not row["diverged"]]
    qos = np.array([row["qos"] for row in ranked])
    for axes, key in zip(shown, PARAMETERS, strict=True):
        at, values = axes.lines[0].get_data()
        np.testing.assert_array_equal(values, qos)
        if key == "network.mlp":
            names = ["[16, 16]", "[8]"]
            assert [label.get_text() for label in axes.get_xticklabels()] == names
            np.testing.assert_array_equal(at, [names.index(str(row[key])) for row in ranked])
        else:
            np.testing.assert_array_equal(at, [row[key] for row in ranked])
    assert [axes.get_xscale() for axes in shown] == ["log", "linear", "linear", "linear"]
    rates, of_rate = shown[0].containers[0].lines[0].get_data()
    high = np.array([row["agent.critic_learning_rate"] == 1e-2 for row in ranked])
    np.testing.assert_allclose(np.array(rates, float), [1e-4, 1e-2])
    np.testing.assert_allclose(np.array(of_rate, float), [qos[~high].mean(), qos[high].mean()])
    (low_end, high_end), _ = shown[0].containers[0].lines[2][0].get_segments()
    # Of 39 pairs of seeds, each with a deviation of 0.0141: t(39) = 2.0227, over the 40 trainings of the first value.
    np.testing.assert_allclose(high_end - low_end, [0, 2 * 2.0227 * 0.014142 / 40**0.5], rtol=1e-3)
    assert len(shown[3].containers[0].lines[0].get_xdata()) == 5, "five parts of a range"


def test_curves_of_the_best_are_means_and_ranges_over_seeds(sweep, tmp_path, figures):
    spec, rows = sweep
    best = ranking(rows)[:2]
    assert [place.trial for place in best] == [38, 37]
    curves = {
        (place.trial, seed): [(300, 0.1 + 0.2 * index), (600, 0.5 + 0.01 * place.trial + 0.2 * index)]
        for place in best
        for index, seed in enumerate(spec.seeds)
    }
    curves_picture(tmp_path / "curves.png", spec, best, curves)
    (axes,) = figures["curves.png"].axes
    assert len(axes.lines) == len(axes.collections) == 2
    for line, area, place in zip(axes.lines, axes.collections, best, strict=True):
        last = 0.5 + 0.01 * place.trial
        np.testing.assert_allclose(line.get_xydata(), [[300, 0.2], [600, last + 0.1]])
        assert line.get_label().startswith(f"{place.trial}: critic_learning_rate=") and "mlp=[" in line.get_label()
        heights = area.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [0.1, last + 0.2])
    assert axes.get_title(loc="left") == "Training of the best trials" and axes.get_legend() is not None
