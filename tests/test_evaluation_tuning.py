"""Tuning finds what is known to be best, keeps it, and is one program for all rates."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jaxroute
from jaxroute.errors import UserError
from jaxroute.evaluation import tuning
from jaxroute.evaluation.tuning import Tuning, tune_routers
from jaxroute.routers import ROUTERS, make_router


@pytest.fixture(scope="module")
def scenario():
    return jaxroute.make("paper-3", slots=6, episode_length=40, metrics="off", penalty="off")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxroute" / "tuned"


def at_rate(params, rate):
    arrivals = params.workload.arrivals.replace(rate=jnp.float32(rate))
    return params.replace(workload=params.workload.replace(arrivals=arrivals))


def test_finds_the_best_and_is_compiled_once_for_all_rates(scenario, folder):
    """Where requests are rare load does not matter, and where they are many a small weight is the worst there is."""
    env, params = scenario
    names, seen = ["score_minus_load", "routellm", "round_robin"], []
    before = tuning._program._cache_size()
    found = {}
    for rate in (0.05, 6.0):
        done = lambda name, result: seen.append(name)  # noqa: E731
        found[rate] = tune_routers(env, at_rate(params, rate), names, decisions=5000, done=done)
    assert tuning._program._cache_size() == before + 1
    assert seen == 2 * names
    weight = {rate: results["score_minus_load"].parameters["weight"] for rate, results in found.items()}
    assert weight[0.05] < 0.05 < weight[6.0]
    for results in found.values():
        assert results["round_robin"] == Tuning({}, None, 0, 0.0)
        for name in names[:2]:
            make_router(name, env, **results[name].parameters)
            assert 0 < results[name].qos < 1 and 4000 < results[name].decisions <= 5000 and not results[name].kept
    pair = found[6.0]["routellm"].parameters
    assert 0 <= pair["strong"] < pair["weak"] < 3

    again = tune_routers(env, at_rate(params, 6.0), names, decisions=5000)
    assert again == {name: result._replace(kept=bool(result.parameters)) for name, result in found[6.0].items()}
    paths = sorted(folder.iterdir())
    assert len(paths) == 4
    for path in paths:
        path.write_text("{")
    assert tune_routers(env, at_rate(params, 6.0), names, decisions=5000)["routellm"].parameters == pair


def test_wrong_input_is_one_line(scenario):
    with pytest.raises(UserError, match="unknown router 'index_rul'; the nearest are index_rule"):
        tune_routers(*scenario, ["index_rul"])
    with pytest.raises(UserError, match="decisions must be a whole number of 1 or more, not 0"):
        tune_routers(*scenario, ["index_rule"], decisions=0)


@pytest.mark.parametrize("name", [name for name, spec in ROUTERS.items() if spec.ranges])
def test_ranges_are_of_parameters_of_the_rule(scenario, name):
    spec = ROUTERS[name]
    for share in (0.0, 1.0):
        parameters = tuning._setting(name, jnp.full(len(spec.ranges), share))
        for choice in spec.choices(3):
            make_router(name, scenario[0], **parameters, **choice)
        assert parameters == {
            key: pytest.approx((between.low, between.high)[int(share)]) for key, between in spec.ranges.items()
        }
