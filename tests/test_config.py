"""Configurations: defaults, files, overrides, saving, and one clear line for what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from jaxroute.agent.flat_network import FlatNetwork
from jaxroute.agent.router_network import RouterNetwork
from jaxroute.agent.sac import Hyperparameters
from jaxroute.agent.trainer import SACConfig
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import config_folder, config_text, dotted_keys, load_config, load_saved_config, nearest_keys
from jaxroute.errors import UserError

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,374,44\n2023-11-16 18:17:05.5,396,109\n"
RECORD = (
    '{"instruction": "Say hi", "input": "", "candidates": ['
    '{"model": "alpaca-7b", "text": "hi", "scores": {"bertscore": 0.7}}, '
    '{"model": "chatglm2-6b", "text": "hello there", "scores": {"bertscore": 0.6}}, '
    '{"model": "vicuna-7b", "text": "hi", "scores": {"bertscore": 0.5}}]}\n'
)


def message(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        build_experiment(load_config(path, overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_the_papers_environment():
    config = load_config()
    env, params, network, hyper, sac, notes, *_ = build_experiment(config)
    assert (env.num_experts, env.num_actions, env.episode_length) == (3, 4, 5000)
    assert float(params.latency_limit) == pytest.approx(0.03)
    assert float(params.workload.arrivals.rate) == 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert network.heads == config.network.heads and network.mlp == (64, 64)
    assert hyper == Hyperparameters(**asdict(config.agent), decay_updates=6250)
    assert sac.num_envs == config.training.num_envs
    assert set(SACConfig.__dataclass_fields__) <= set(asdict(config.training))
    assert notes == []


def test_sections_reach_what_they_describe():
    overrides = ["environment.id=paper-6", "environment.latency_limit=0.05", "environment.kv_cache_tokens=1600"]
    overrides += [
        "environment.penalty=off",
        "environment.slots=8",
        "workload.arrivals.rate=4",
        "network.residual=false",
    ]
    env, params, network, *_ = build_experiment(load_config(None, overrides))
    assert (env.num_experts, env.slots, env.penalty) == (6, 8, "off")
    assert float(params.latency_limit) == pytest.approx(0.05)
    np.testing.assert_array_equal(params.engines.usable_blocks, [100] * 6)
    assert not network.residual


def test_experts_take_the_place_of_the_scenarios():
    env, params, *_ = build_experiment(load_config(None, ["environment.experts=[koala-7B, baize-7b]"]))
    assert env.num_experts == params.workload.num_experts == 2


def test_hardware_of_each_expert():
    overrides = ["environment.kv_cache_tokens=[160, 320, 48e1]", "environment.profile=[paper, rtx4090, a100]"]
    config = load_config(None, overrides)
    assert config.environment.kv_cache_tokens == (160, 320, 480)
    engines = build_experiment(config).params.engines
    np.testing.assert_array_equal(engines.usable_blocks, [10, 20, 30])
    np.testing.assert_array_equal(engines.max_num_seqs, [64, 256, 256])


def test_ranges_are_spread_over_the_environments_of_training():
    ranges = ["training.rate_range=[1, 8]", "training.latency_limit_range=[0.02, 0.06]", "training.num_envs=32"]
    experiment = build_experiment(load_config(None, ranges))
    rates = np.asarray(experiment.training_params.workload.arrivals.rate)  # pyright: ignore
    limits = np.asarray(experiment.training_params.latency_limit)
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(8) / 32, rtol=1e-3)
    assert 1 < rates[0] < 1.1 and 7.5 < rates[-1] < 8
    assert 0.02 <= limits.min() < 0.021 and 0.058 < limits.max() < 0.06
    assert abs(np.corrcoef(rates, limits)[0, 1]) < 0.2
    axes = experiment.params_axes
    assert axes.workload.arrivals.rate == axes.latency_limit == 0  # pyright: ignore
    assert axes.engines is not None and axes.engines.usable_blocks is None
    assert float(experiment.params.workload.arrivals.rate) == 3.0  # pyright: ignore


def test_a_range_of_rates_scales_a_trace(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    overrides = [f"workload.arrivals.path={tmp_path / 'trace.csv'}", "training.rate_range=[0.5, 2]"]
    experiment = build_experiment(load_config(config_folder() / "azure-conv.yaml", overrides))
    assert experiment.training_params.workload.arrivals.rate_scale.shape == (64,)  # pyright: ignore


def test_networks_of_each_kind():
    assert isinstance(build_experiment(load_config(None, ["network.kind=flat"])).network, FlatNetwork)
    by_graph = build_experiment(load_config(None, ["network.kind=han_jraph", "environment.queue_nodes=all"]))
    assert by_graph.network == build_experiment(load_config()).network.clone(encoder_path="jraph")
    assert by_graph.env.queue_nodes == "all"
    assert isinstance(build_experiment(load_config()).network, RouterNetwork)


def test_short_training_has_short_chunks():
    experiment = build_experiment(load_config(None, ["training.frames=100", "training.num_envs=32"]))
    assert experiment.sac.steps_per_chunk == 4
    assert experiment.hyperparameters.warmup_frames == 50
    assert experiment.notes[0].startswith("agent.warmup_frames cut to 50")


@pytest.mark.parametrize("name", ["default", "paper", "azure-conv", "azure-conv-full", "text"])
def test_the_configurations_that_come_along(name, tmp_path):
    trace, answers = tmp_path / "trace.csv", tmp_path / "answers.jsonl"
    trace.write_text(TRACE)
    answers.write_text(RECORD)
    overrides = [f"workload.arrivals.path={trace}"] if "azure" in name else []
    overrides += [f"workload.requests.path={answers}"] if name == "text" else []
    experiment = build_experiment(load_config(config_folder() / f"{name}.yaml", overrides))
    assert experiment.env.num_experts == 3
    if name == "text":
        assert len(experiment.notes) == 1 and "frozen generator's errors; 4 of 4 lengths est" in experiment.notes[0]


def test_numbers_and_texts_of_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "environment: {penalty: off}\nagent: {tau: 1e-3, max_grad_norm: 5}\ntraining: {frames: 1e5}\nnetwork:\n"
    )
    config = load_config(path)
    assert config.environment.penalty == "off"
    assert config.agent.tau == 0.001
    assert config.agent.max_grad_norm == 5.0 and isinstance(config.agent.max_grad_norm, float)
    assert config.training.frames == 100_000 and isinstance(config.training.frames, int)


def test_overrides_come_after_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("agent: {gamma: 0.9, tau: 0.1}\n")
    agent = load_config(path, ["agent.gamma=0.95", "agent={tau: 0.2}", "agent.tau=0.3"]).agent
    assert (agent.gamma, agent.tau) == (0.95, 0.3)


def test_data_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["workload.arrivals.kind=trace", "workload.arrivals.path=a.csv"])
    assert config.workload.arrivals.path == str(tmp_path / "a.csv")


def test_saved_configuration_is_read_back_whole(tmp_path):
    config = load_config(None, ["environment.penalty=off", "network.mlp=[32]", "agent.tau=1e-7"])
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config))
    assert load_saved_config(path) == config
    assert load_saved_config(path, ["evaluation.episodes=30"]).evaluation.episodes == 30
    path.write_text(config_text(config).partition("  tau:")[0])
    with pytest.raises(UserError, match="agent.tau: missing; the file is cut short"):
        load_saved_config(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("agent.gama=0.9", "command line: unknown key agent.gama; nearest: agent.gamma"),
        ("enviroment.slots=3", "unknown key enviroment; nearest: environment"),
        ("environment.arrival_rate=4", "unknown key environment.arrival_rate; nearest: workload.arrivals.rate"),
        ("gamma=0.9", "unknown key gamma; nearest: agent.gamma"),
        ("training.frames=many", "training.frames: expected a whole number of 1 or more, got 'many'"),
        ("training.frames=1.5", "training.frames: expected a whole number of 1 or more, got 1.5"),
        ("training.frames=true", "training.frames: expected a whole number of 1 or more, got True"),
        ("training.frames=", "training.frames: expected a whole number of 1 or more, got nothing"),
        ("network.residual=1", "network.residual: expected true or false, got 1"),
        ("network.mlp=64", "network.mlp: expected a list of one or more whole numbers of 1 or more, got 64"),
        (
            "network.mlp=[64, big]",
            "network.mlp: expected a list of one or more whole numbers of 1 or more, got [64, 'big']",
        ),
        ("network=3", "network: expected keys and values, got 3"),
        ("network.heads=7", "network.hidden: expected a multiple of network.heads (7)"),
        ("environment.latency_limit=0", "environment.latency_limit: expected a number above 0, got 0"),
        ("environment.latency_limit=-1", "environment.latency_limit: expected a number above 0, got -1"),
        ("environment.latency_limit=.nan", "environment.latency_limit: expected a number above 0, got '.nan'"),
        ("environment.penalty=on", "environment.penalty: expected one of predicted, paper, exact, off, got 'on'"),
        ("environment.id=papr-3", "environment.id=papr-3: unknown environment id 'papr-3'; the nearest are paper-3"),
        ("environment={id: cluster, profile: a40}", "environment.id=cluster: environment cluster needs a file"),
        ("environment.path=a.yaml", "environment.id=paper-3: unknown environment option 'path'"),
        ("environment.id=azure", "environment.id=azure: environment azure needs a file"),
        ("environment={id: azure, path: /nowhere.csv}", "environment.id=azure: /nowhere.csv"),
        ("environment={id: mixed-3, experts: [mpt-7b]}", "environment.id=mixed-3: profile: 3 names for 1 experts"),
        ("environment.profile=rtx409", "unknown profile 'rtx409'; the nearest are rtx4090"),
        ("environment.profile=3", "environment.profile: expected a text, or a list of one or more names, got 3"),
        ("environment.profile=[paper]", "environment.id=paper-3: profile: 1 names for 3 experts; give one, or one for"),
        ("environment.kv_cache_tokens=[999, 999]", "kv_cache_tokens: 2 numbers for 3 experts"),
        ("environment.kv_cache_tokens=15", "environment.kv_cache_tokens: expected a whole number from 16 to 2097151"),
        ("environment.kv_cache_tokens=[15]", "environment.kv_cache_tokens: expected a whole number from 16 to 2097151"),
        ("environment.kv_cache_tokens=3000000", "environment.kv_cache_tokens: expected a whole number from 16 to"),
        ("environment.experts=[koala-7b]", "unknown expert 'koala-7b'; the nearest are koala-7B"),
        ("environment.experts=[]", "environment.experts: expected a list of one or more names, got []"),
        ("agent.gamma=1.1", "agent.gamma: expected a number above 0, at most 1, got 1.1"),
        ("training.buffer_capacity=1000", "training.buffer_capacity: expected a multiple of training.num_envs (64)"),
        ("training.rate_range=[3]", "training.rate_range: expected two numbers above 0, the smaller first"),
        ("network.kind=mlp", "network.kind: expected one of han, han_jraph, flat, got 'mlp'"),
        ("environment.queue_nodes=0", "queue_nodes: expected a whole number of 1 or more, or all, got 0"),
        ("environment.queue_nodes=every", "queue_nodes: expected a whole number of 1 or more, or all, got 'every'"),
        ("training.frames=63", "training.frames=63: expected 128 or more, two steps of training.num_envs=64"),
        ("evaluation.episodes=1", "evaluation.episodes: expected a whole number of 2 or more"),
        (
            "evaluation.routers=[round-robin]",
            "unknown router in evaluation.routers 'round-robin'; the nearest are round_robin",
        ),
        ("workload.arrivals.kind=trace", "workload.arrivals.path: missing; add workload.arrivals.path=TRACE"),
        ("workload.arrivals.rates=3", "workload.arrivals.rates: expected a list, each a number of 0 or more, got 3"),
        ("workload.arrivals.rates=[1, -3]", "expected a list, each a number of 0 or more, got [1, -3]"),
        (
            "workload.arrivals.kind=piecewise",
            "workload.arrivals.rates: expected as many as workload.arrivals.durations",
        ),
        ("workload.arrivals.start=3", "workload.arrivals.start: the scenario's arrivals have no such value; set"),
        (
            "workload.arrivals.rate_scale=3",
            "workload.arrivals.rate_scale: the scenario's arrivals have no such value; set",
        ),
        ("workload.requests.kind=jsonl", "workload.requests.path: missing; add workload.requests.path=FILE"),
        ("workload.requests.kind=trace", "set workload.arrivals.kind=trace"),
        ("workload={arrivals: {kind: trace, path: /nowhere.csv}}", "/nowhere.csv"),
        ("agent.gamma", "'agent.gamma' is not an override; write section.key=value"),
        ("agent.gamma=[", "agent.gamma: '[' is not a YAML value"),
    ],
)
def test_wrong_overrides(override, expected):
    assert expected in message(None, override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("agent:\n  gama: 1\n", "a.yaml: unknown key agent.gama; nearest: agent.gamma"),
        ("agent:\n  gamma: high\n", "a.yaml: agent.gamma: expected a number above 0, at most 1, got 'high'"),
        ("agent:\n  gamma: [\n", "a.yaml: line 3: not YAML"),
        ("- agent\n", "a.yaml: a configuration: expected keys and values, got ['agent']"),
        ("agent: !!python/object/apply:os.getcwd []\n", "a.yaml: line 1: not YAML"),
        ("\0", "a.yaml: not YAML"),
    ],
)
def test_wrong_files(text, expected, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert expected in message(path)


def test_unreadable_files(tmp_path):
    assert f"{tmp_path}: cannot be read (Is a directory)" in message(tmp_path)
    assert "none.yaml: cannot be read (No such file or directory)" in message(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "a.yaml: not a text file" in message(tmp_path / "a.yaml")


def test_number_of_models_must_be_that_of_experts(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(RECORD)
    text = message(
        config_folder() / "text.yaml", f"workload.requests.path={path}", "workload.requests.experts=[alpaca-7b]"
    )
    assert "workload.requests.experts: 1 models for 3 experts" in text


def test_lengths_of_answers_are_cut_where_wished(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(RECORD)
    overrides = [f"workload.requests.path={path}", "workload.requests.max_prompt_tokens=2"]
    overrides += ["workload.requests.max_output_tokens=1"]
    rows = build_experiment(load_config(config_folder() / "text.yaml", overrides)).params.workload.requests.rows  # pyright: ignore
    assert rows.prompt_tokens.tolist() == [2] and rows.output_tokens.tolist() == [[1, 1, 1]]


def test_traces_that_cannot_be_replayed(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    overrides = ["workload.arrivals.kind=trace", f"workload.arrivals.path={path}"]
    start = message(None, *overrides, "workload.arrivals.start=3")
    assert start == f"workload.arrivals: {path}: start must lie within the trace's 0 to 2.5 s, is 3.0"
    path.write_text("".join(TRACE.splitlines(True)[:2]))
    assert message(None, *overrides).startswith(f"workload.arrivals: {path}: a trace needs at least two")


def test_every_key_is_its_own_nearest():
    assert all(nearest_keys(key)[0] == key for key in dotted_keys())
