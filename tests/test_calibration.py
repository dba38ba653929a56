"""Calibration: many candidates equal the exact engine, known coefficients come back, and profiles work everywhere."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxroute
from benchmarks.calibration import random_log
from jaxroute.calibration.candidates import Candidates, LogRequests, Simulated, simulate
from jaxroute.calibration.judgement import Server, Times, judge, load_at_arrival, run, series, splits
from jaxroute.calibration.linear import information, linear
from jaxroute.calibration.logs import load_log
from jaxroute.calibration.options import ServerOptions, load_options
from jaxroute.calibration.report import picture
from jaxroute.calibration.search import Simulator, relative_errors, search
from jaxroute.calibration.space import search_space
from jaxroute.calibration.uncertainty import ParameterInterval, intervals
from jaxroute.commands import replay as replay_command
from jaxroute.commands.calibrate import main, profile_text
from jaxroute.errors import UserError
from jaxroute.simulator.catalogue import load_profile, shipped
from jaxroute.simulator.engine_config import engine_from_config
from jaxroute.simulator.presets import PRESETS
from jaxroute.simulator.profiles import engine_profiles
from jaxroute.simulator.roofline import roofline_by_name
from tests.reference.engine import simulate as reference_engine

SHARED = Path(__file__).parents[2] / "shared" / "data"
ENGINE = {
    "latency": [0.01, 1e-4, 2e-4, 2e-7, 128, 5e-5],
    "num_gpu_blocks": 200,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
}
LOG = random_log(np.random.default_rng(1), ENGINE, 1.2, 40, 0.0)  # waiting, preemption, full seats


def as_requests(log) -> LogRequests:
    tokens = [jnp.asarray(values, jnp.int32) for values in (log.prompt_tokens, log.output_tokens)]
    return LogRequests(jnp.asarray(log.arrival, float), *tokens, jnp.zeros(len(log), jnp.int32))


def simulated(configs, num_slots: int, engines: int = 1) -> Simulated:
    each = [engine_from_config(config, "test") for config in configs]
    servers = Candidates(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), jnp.zeros(len(each)))
    return simulate(servers, as_requests(LOG), jnp.asarray(1e4), jnp.int32(10**6), num_slots, engines)


def test_candidates_equal_replay_with_fewer_slots_than_requests():
    unchunked = {**ENGINE, "num_gpu_blocks": 150, "enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
    stuck = {**ENGINE, "num_gpu_blocks": 4}
    wide = {**ENGINE, "latency": [0.05, 0, 0, 0], "num_gpu_blocks": 9999, "max_num_seqs": 64}
    out = simulated([ENGINE, unchunked, stuck, wide], 16)
    assert out.overflowed.tolist() == [False, False, False, True] and int(out.preemptions[0]) > 0
    for lane, config in enumerate((ENGINE, unchunked)):
        want = run(LOG, Server(config))
        assert np.allclose(out.first_token[:, lane], want.first_token, rtol=1e-4, atol=1e-3)
        assert np.allclose(out.finish[:, lane], want.finish, rtol=1e-4, atol=1e-3)
    assert np.isinf(out.finish[:, 2]).any()


def test_candidates_have_the_prefix_cache_of_a_version():
    """Preempted requests find their own blocks, and requests what the log says that they share; as in `replay`, where
    nothing is evicted before it is found.
    """
    own = {**ENGINE, **PRESETS["vllm-0.19"].switches, "num_gpu_blocks": 170}
    out = simulated([own], 16)
    want = run(LOG, Server(own))
    assert int(out.preemptions[0]) > 3 and not np.allclose(want.finish, run(LOG, Server(ENGINE)).finish)
    assert np.allclose(out.first_token[:, 0], want.first_token, rtol=1e-4, atol=1e-3)
    assert np.allclose(out.finish[:, 0], want.finish, rtol=1e-4, atol=1e-3)

    calm = replace(random_log(np.random.default_rng(2), ENGINE, 0.1, 40, 0.0), shared_tokens=np.zeros(40, np.int32))
    prompts = np.where(np.arange(40) % 2, np.roll(calm.prompt_tokens, 1) + 40, calm.prompt_tokens).astype(np.int32)
    shared = np.where(np.arange(40) % 2, (np.roll(prompts, 1) - 1) // 16 * 16, 0).astype(np.int32)
    log = replace(calm, prompt_tokens=prompts, shared_tokens=shared)
    large = {**own, "num_gpu_blocks": 5000, "max_num_seqs": 64}
    servers = Candidates(jax.tree.map(lambda leaf: leaf[None], engine_from_config(large, "test")), jnp.zeros(1))
    requests = replace(as_requests(log), shared_tokens=jnp.asarray(shared))
    out = simulate(servers, requests, jnp.asarray(1e4), jnp.int32(10**6), 40, 1)
    want, without = run(log, Server(large)), run(replace(log, shared_tokens=None), Server(large))
    assert (want.finish < without.finish - 1e-4).sum() > 15
    assert np.allclose(out.finish[:, 0], want.finish, rtol=1e-4, atol=1e-3)


def test_data_parallel_engines_are_fed_by_the_servers_rule():
    """Two engines: a plain loop routes by 4 * waiting + running at each arrival, on the reference simulator."""
    out = simulated([ENGINE], 40, engines=2)
    assigned: list[list[int]] = [[], []]
    for request in range(len(LOG)):
        scores = [load_of(reference(own), float(LOG.arrival[request])) for own in assigned]
        assigned[int(np.argmin(scores))].append(request)
    for own in assigned:
        want = [entry["finish_time"] for entry in reference(own)["per_request"].values()]
        assert np.allclose(out.finish[np.asarray(own), 0], want, rtol=1e-4, atol=1e-3)


def reference(positions: list[int]) -> dict:
    columns = (LOG.arrival, LOG.prompt_tokens, LOG.output_tokens)
    names = ("arrival_time", "prompt_len", "output_len")
    requests = [{name: column[i].item() for name, column in zip(names, columns, strict=True)} for i in positions]
    return reference_engine({"config": ENGINE, "requests": requests})


def load_of(result: dict, at: float) -> int:
    """4 * waiting + running of an engine that has run every iteration that starts before `at`."""
    started = [record for record in result["iterations"] if record["t"] < at]
    if not started:
        return 0
    left = sum(len(record["finished"]) for record in started)
    running = started[-1]["running"] - len(started[-1]["finished"])
    return 4 * (len(result["per_request"]) - left - running) + running


def test_known_coefficients_come_back_or_are_flagged():
    log = random_log(np.random.default_rng(3), ENGINE, 0.7, 40, 0.01)
    options = ServerOptions("known", {key: value for key, value in ENGINE.items() if key != "latency"})
    simulator = Simulator(search_space(log, options), log, 32)
    everyone = np.ones(len(log), bool)
    seen = []
    fit = search(simulator, everyone, 0, time.monotonic() + 600, lambda *values: seen.append(values), 12, 3)
    values, found = simulator.space.values(fit.point), intervals(simulator, fit, everyone)
    assert len(seen) == 15 and simulator.evaluated > 500
    assert abs(values["base"] / 0.01 - 1) < 0.1
    for name, true in zip(("base", "per_prefill_token", "per_decode"), ENGINE["latency"], strict=False):
        assert not found[name].identified or abs(values[name] / true - 1) < 0.05
    assert not found["knee_tokens"].identified


def test_information_knows_what_the_slopes_tell():
    random = np.random.default_rng(0)
    steps = 0.1 * random.standard_normal((200, 2))
    truth = random.standard_normal((60, 3))
    errors = 0.02 * random.standard_normal((60, 3)) + steps[:, :1, None] * truth  # of the second parameter: nothing
    errors = errors - 0.05 * truth + 1e-3 * random.standard_normal((200, 60, 3))
    known = information(linear(steps, errors))
    step = known.solve(known.gradients.sum(0))
    assert abs(step[0] - 0.05) < 0.01 and abs(step[1]) < 0.01
    assert known.deviations[0] < 0.01 and known.deviations[1] > 0.2


def test_judgement_is_zero_for_the_engine_itself_and_errors_are_relative():
    times = run(LOG, Server(ENGINE))
    for split in splits(LOG):
        judged = judge(LOG, times, ~split.fitted)
        assert all(
            abs(judged[metric]["error"][key]) < 1e-4 for metric in ("ttft", "tpot", "e2e") for key in ("mean", "p99")
        )
        assert abs(judged["makespan"]["error"]) < 1e-5
    late = relative_errors(LOG, LOG.first_token + 1, LOG.finish + 1)
    assert np.allclose(late[:, 2], 1 / LOG.measured["e2e"]) and np.allclose(late[:, 1], 0, atol=1e-9)
    counts = series(LOG, Server(ENGINE))
    assert counts["running"].max() == 11 and counts["waiting"].min() == 0 and counts["waiting"].max() > 5


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "mine.yaml"
    judged, split = judge(LOG, run(LOG, Server(ENGINE)), splits(LOG)[0].fitted), splits(LOG)[0]
    found = {"base": ParameterInterval(0.0099, 0.0101, True), "per_decode": ParameterInterval(0.0, 1e-3, False)}
    options = ServerOptions("engine.yaml", {})
    path.write_text(profile_text("mine", LOG, options, Server(ENGINE), found, ["a warning"], judged, split))
    return path


def test_a_profile_is_an_expert_everywhere(profile, tmp_path, capsys):
    tree = load_profile(profile)
    assert tree["engine"]["latency"] == ENGINE["latency"] and tree["fit"]["not_identified"][0] == "per_decode"
    (own,) = engine_profiles(["koala-7B"], str(profile))
    assert own.usable_blocks == 199 and own.latency_limit == 0.015 and own.engine["max_num_batched_tokens"] == 512
    _, params = jaxroute.make("paper-3", profile=str(profile))
    assert params.engines.latency.base.tolist() == pytest.approx([0.01] * 3)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"experts: [{{mean_score: 0.7, profile: {profile}}}, {{mean_score: 0.6, profile: 'roofline:l4:qwen2.5-7b'}}]"
    )
    _, params = jaxroute.make("cluster", path=cluster)
    assert params.engines.max_num_seqs.tolist() == [12, 256]
    spec = tmp_path / "r.csv"
    spec.write_text("arrival_time,prompt_len,output_len\n0,10,2\n")
    assert replay_command.main([str(spec), "--out", str(tmp_path / "o.json"), "--profile", str(profile)]) == 0
    assert "1 of 1 requests finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("rtx4091", None, "unknown profile 'rtx4091'; the nearest are rtx4090"),
        ("roofline:l4", None, "a guess is named roofline:GPU:MODEL"),
        ("roofline:l4:qwen3-32b", None, "leave no KV cache in 1 x 24 GB"),
        ("roofline:l5:qwen3-32b", None, "unknown GPU 'l5'"),
        ("none.yaml", None, "none.yaml: cannot be read"),
        ("p.yaml", "engine: 3", "key engine: a mapping of engine options is missing"),
        ("p.yaml", "engine: {latency: [1, 2, 3]}", "engine: needs latency and num_gpu_blocks"),
        ("p.yaml", "engine: {latency: [1, 2], num_gpu_blocks: 9}", "latency must be [c0, c1, c2, c3]"),
        ("p.yaml", "engine: {}\nmodle: x", "unknown key 'modle'"),
    ],
)
def test_bad_profiles(tmp_path, name, text, problem):
    if text is not None:
        name = str(tmp_path / name)
        Path(name).write_text(text)
    with pytest.raises(UserError) as error:
        engine_profiles(["koala-7B"], name)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_shipped_profiles_say_where_they_come_from():
    assert len(shipped()) >= 2
    for name in shipped():
        tree = load_profile(name)
        assert tree["name"] == name and not tree["guess"]
        assert {"log", "requests", "model", "gpu"} <= tree["source"].keys()
        assert {"judged_on", "intervals", "not_identified", "makespan_error"} <= tree["fit"].keys()
        assert {"requests_per_s", "most_running"} <= tree["load"].keys()
        assert abs(tree["fit"]["e2e_median_request_error"]) < 0.03


def test_roofline_of_a_data_sheet():
    engine = roofline_by_name("rtx4090", "llama-3.1-8b")
    base, _, _, context, knee, steep = engine["latency"]
    assert 0.014 < base < 0.016 and 1.2e-7 < context < 1.4e-7  # 15 GB of weights, 131,072 bytes a token, 1,008 GB/s
    assert knee * steep == pytest.approx(base) and 2000 < engine["num_gpu_blocks"] < 3000
    two = roofline_by_name("rtx4090", "llama-3.1-8b", 2)
    assert two["latency"][0] == pytest.approx(base / 2)


def test_picture_shows_distributions_queues_and_errors(tmp_path, figures):
    recorded = {"t": np.array([0.0, 1.0]), "running": np.array([3, 4]), "waiting": np.array([0, 5])}
    counts = {"t": np.array([0.0, 2.0]), "running": np.array([1, 2]), "waiting": np.array([7, 8])}
    log = replace(LOG, series=recorded)
    times, guess = Times(log.first_token + 1, log.finish + 1), Times(log.first_token + 2, log.finish + 2)
    among = log.ids % 2 == 1
    picture(tmp_path / "with.png", log, among, times, guess, counts)
    panels = figures["with.png"].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        *("TTFT", "time per output token", "end to end", "running requests", "waiting requests", "error against load")
    ]
    assert [axes.get_xlabel() for axes in panels[:3]] == ["s", "ms", "s"]
    for axes, metric, scale, late in zip(panels, ("ttft", "tpot", "e2e"), (1, 1e3, 1), (1, 0, 1), strict=False):
        values = np.sort(log.measured[metric][among])
        assert [line.get_label() for line in axes.lines] == ["measured", "simulated", "roofline guess"]
        for factor, line in enumerate(axes.lines):
            np.testing.assert_allclose(line.get_xdata(), scale * (values + factor * late), rtol=1e-9)
            np.testing.assert_allclose(line.get_ydata(), np.arange(1, among.sum() + 1) / among.sum())
    for axes, name in zip(panels[3:5], ("running", "waiting"), strict=True):
        assert [line.get_ydata().tolist() for line in axes.lines] == [recorded[name].tolist(), counts[name].tolist()]
        assert axes.lines[1].get_drawstyle() == "steps-post"
    whole, of_token, _ = panels[5].lines
    assert [line.get_label() for line in (whole, of_token)] == ["end to end", "time per output token"]
    np.testing.assert_array_equal(whole.get_xdata(), load_at_arrival(log)[among])
    np.testing.assert_allclose(whole.get_ydata(), 100 / log.measured["e2e"][among])
    np.testing.assert_allclose(of_token.get_ydata(), 0, atol=1e-6)

    picture(tmp_path / "without.png", LOG, among, times, None, counts)
    panels = figures["without.png"].axes
    assert [len(axes.lines) for axes in panels] == [2, 2, 2, 1, 1, 3]


def test_command_writes_profile_picture_and_page(tmp_path, capsys, monkeypatch, figures):
    monkeypatch.setattr("jaxroute.commands.calibrate.LANES", 32)  # as above, so that a program is compiled once
    path, out = tmp_path / "log.csv", tmp_path / "p.yaml"
    columns = (LOG.arrival, LOG.prompt_tokens, LOG.output_tokens, LOG.first_token, LOG.finish)
    rows = [",".join(map(str, row)) for row in zip(*columns, strict=True)]
    path.write_text("\n".join(["arrival_time,prompt_len,output_len,first_token_time,finish_time", *rows]))
    engine = tmp_path / "e.yaml"
    engine.write_text(yaml.safe_dump({key: value for key, value in ENGINE.items() if key != "latency"}))
    assert main([str(path), "--engine", str(engine), "--out", str(out), "--deadline", "10"]) == 0
    printed = capsys.readouterr()
    assert "Errors on requests that were not fitted" in printed.out and "is not identified by this log" in printed.err
    assert "names no known GPU and model" in printed.out
    assert load_profile(out)["engine"]["num_gpu_blocks"] == 200
    page = out.with_suffix(".html").read_text()
    png = base64.b64encode(out.with_suffix(".png").read_bytes()).decode()
    assert f"data:image/png;base64,{png}" in page and "http" not in page.replace("http-equiv", "")
    judged = [line.get_xdata() for line in figures["p.png"].axes[2].lines]
    assert [len(values) for values in judged] == [len(LOG) // 2] * 2, "no guess for no known GPU"
    np.testing.assert_allclose(*judged, rtol=0.2)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded log in ../shared/data")
def test_the_recorded_log_with_its_shipped_profile():
    log = load_log(SHARED / "rtx4090_llama31_8b_vllm.jsonl")
    options = load_options(SHARED / "rtx4090_llama31_8b_vllm_config.json")
    assert options.unknown == [] and log.series is not None and len(log) == 300
    tree = load_profile("rtx4090-llama-3.1-8b")
    server = Server(tree["engine"], 1, tree["fit"]["prefix_hits"], tree["request_overhead"])
    judged = judge(log, run(log, server), log.ids % 2 == 1)
    assert abs(judged["ttft"]["error"]["mean"]) < 0.05 and abs(judged["tpot"]["error"]["mean"]) < 0.03
    assert judged["e2e"]["median_error"] < 0.03 and abs(judged["makespan"]["error"]) < 0.02
