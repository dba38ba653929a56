"""Every registered environment by `environment.id`: its own values, and what a configuration puts in their place."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxroute
from jaxroute.config.build import Experiment, build_experiment
from jaxroute.config.loader import load_config
from jaxroute.errors import UserError
from jaxroute.workload import MarkovArrivals, PoissonArrivals, TraceArrivals
from tests.test_config import TRACE
from tests.test_scenarios import CLUSTER


@pytest.fixture
def paths(tmp_path, monkeypatch) -> dict[str, str]:
    """Files in the current directory for the environments that need one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "experts.yaml").write_text(CLUSTER)
    return {"azure": "trace.csv", "cluster": "experts.yaml"}


def described(name: str, *overrides: str, paths: dict[str, str]) -> Experiment:
    path = [f"environment.path={paths[name]}"] if name in paths else []
    return build_experiment(load_config(None, [f"environment.id={name}", *path, *overrides]))


def test_what_a_configuration_leaves_to_the_scenario_is_the_scenarios(paths):
    """So whatever `configs/default.yaml` itself sets is what every scenario has anyway."""
    for name in jaxroute.environments():
        experiment = described(name, paths=paths)
        env, params = jaxroute.make(name, **{"path": paths[name]} if name in paths else {})
        assert experiment.env == env and len(experiment.experts) == env.num_experts
        jax.tree.map(np.testing.assert_array_equal, experiment.params.replace(credit_discount=None), params)


def test_what_a_configuration_sets_takes_the_place_of_the_scenarios(paths):
    def params_of(*changes: str) -> Any:
        return described(*changes, paths=paths).params

    assert float(params_of("overload-3", "workload.arrivals.rate=7").workload.arrivals.rate) == 7
    assert float(params_of("rtx4090-3", "environment.latency_limit=0.05").latency_limit) == pytest.approx(0.05)
    assert described("rtx4090-3", "environment.slots=8", paths=paths).env.slots == 8
    np.testing.assert_array_equal(
        params_of("a100-3", "environment.kv_cache_tokens=160").engines.usable_blocks, [10] * 3
    )
    bursts = params_of("bursts-3", "environment.profile=rtx4090")
    assert isinstance(bursts.workload.arrivals, MarkovArrivals) and int(bursts.engines.max_num_seqs[0]) == 256
    calm = params_of("bursts-3", "workload.arrivals={kind: poisson, rate: 4}").workload.arrivals
    assert isinstance(calm, PoissonArrivals) and float(calm.rate) == 4
    azure = params_of("azure", "workload.arrivals.rate_scale=2", "environment.experts=[mpt-7b, baize-7b]").workload
    assert isinstance(azure.arrivals, TraceArrivals) and float(azure.arrivals.rate_scale) == 2
    assert azure.num_experts == 2
    slowed = params_of(
        "slowdown-3", "environment.experts=[mpt-7b, baize-7b]", "environment.episode_length=30"
    ).disturbances
    np.testing.assert_array_equal(slowed.starts, [0, 10, 20])
    np.testing.assert_array_equal(slowed.slowness, [[1, 1], [3, 1], [1, 1]])
    cluster = params_of("cluster", "environment.latency_limit=0.1", "workload.arrivals.rate=2", "environment.slots=4")
    assert float(cluster.latency_limit) == pytest.approx(0.1) and float(cluster.workload.arrivals.rate) == 2


def test_a_cluster_can_have_recorded_requests(paths):
    trace = "workload={arrivals: {kind: trace, path: trace.csv}, requests: {kind: trace}}"
    workload: Any = described("cluster", trace, paths=paths).params.workload
    np.testing.assert_allclose(workload.requests.score_mean, [0.6, 0.8])
    np.testing.assert_array_equal(workload.requests.prompt_tokens, [374, 396])


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        (
            "bursts-3",
            "workload.arrivals.rate=3",
            "workload.arrivals.rate: the scenario's arrivals have no such value; set",
        ),
        ("bursts-3", "workload.arrivals.kind=poisson", "workload.arrivals.rate: missing"),
        ("bursts-3", "training.rate_range=[1, 2]", "training.rate_range: bursts and piecewise arrivals have no single"),
        ("cluster", "environment.profile=a40", "environment.id=cluster: unknown environment option 'profile'"),
    ],
)
def test_what_a_scenario_cannot_have_is_one_clear_line(paths, name, override, words):
    with pytest.raises(UserError, match=words) as error:
        described(name, override, paths=paths)
    assert "\n" not in str(error.value)
