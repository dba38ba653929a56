"""`jaxroute serve` as a process: what it says, how it ends, bad input; the record and the sidecar."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import aiohttp
import jax
import numpy as np
import pytest

pytest.importorskip("uvloop", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from jaxroute.agent.trainer import policy_router  # noqa: E402
from jaxroute.calibration.logs import load_log  # noqa: E402
from jaxroute.commands.serve import main  # noqa: E402
from jaxroute.config.build import build_experiment  # noqa: E402
from jaxroute.config.loader import config_text, load_config  # noqa: E402
from jaxroute.runs.checkpoint import save_checkpoint  # noqa: E402
from jaxroute.serving.build import router_of  # noqa: E402
from jaxroute.serving.cluster import load_cluster  # noqa: E402
from jaxroute.serving.decision import Asked, Decider  # noqa: E402
from jaxroute.serving.ledger import Ledger  # noqa: E402
from jaxroute.serving.log import Log  # noqa: E402
from tests.compiling import compile_fast  # noqa: E402
from tests.live_front_end import front_end, process, write_cluster  # noqa: E402
from tests.mock_servers import MockServer, mock_servers  # noqa: E402
from tests.test_serving_front_end import CHAT, post, stream  # noqa: E402


def test_the_process_serves_and_ends_on_sigterm(tmp_path):
    async def run():
        async with mock_servers(2, gap=0.05) as servers:
            cluster = write_cluster(tmp_path / "experts.yaml", servers)
            text = cluster.read_text().replace("name: e0", "name: e0, api_key_env: E0_KEY")
            cluster.write_text(text)
            arguments = ("shortest_queue", "--cluster", str(cluster), "--record", str(tmp_path / "log.jsonl"))
            async with process(tmp_path, *arguments, E0_KEY="upstream", JAXROUTE_API_KEY="mine") as served:
                lines = served.lines
                assert lines[0] == "shortest_queue routes to e0, e1; limit 10000 ms a token"
                assert "running means, from 200 tokens on" in lines[1]
                assert "log.e0.jsonl" in lines[2]
                headers = {"Authorization": "Bearer mine"}
                async with aiohttp.ClientSession(served.address, headers=headers) as session:
                    assert (await post(session, CHAT))[0] == 200
                    assert servers[0].headers[0]["Authorization"] == "Bearer upstream"
                    task = asyncio.create_task(stream(session, {**CHAT, "max_tokens": 20}))
                    await asyncio.sleep(0.3)
                    served.process.send_signal(signal.SIGTERM)
                    assert (await task)[-1] == "[DONE]"
                errors = await served.ended()
                assert served.process.returncode == 0
                assert "shutting down: 1 requests are open" in errors
                assert not any(word in errors for word in ("upstream", "five words", "Traceback"))

    asyncio.run(run())


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("url: 'http://127.0.0.1:0', ", "", "experts[0]: url is missing"),
        ("http://127.0.0.1:0", "localhost:80", "experts[0]: url must be like http://host:8000, not 'localhost:80'"),
        ("http://127.0.0.1:0", "http://h:x", "url must be like"),
        ("mean_score: 0.7", "mean_scor: 0.7", "experts[0]: unknown key 'mean_scor'; the nearest are mean_score"),
        ("mean_score: 0.7", "mean_score: 7", "mean_score must be at most 1"),
        ("kv_blocks: 875", "kv_blocks: -1", "kv_blocks must be a whole number"),
        (
            "latency: [0.015, 7.2e-5, 5e-5, 2.5e-5], kv_blocks: 875, max_num_seqs: 64",
            "profile: rtx409",
            "experts[0]: unknown profile 'rtx409'",
        ),
        ("latency: [0.015, 7.2e-5, 5e-5, 2.5e-5], ", "", "kv_blocks needs latency"),
        ("name: e0", "name: e1", "the name 'e1' occurs twice"),
        ("name: e0", "name: e0, api_key_env: NOT_SET", "the environment variable NOT_SET is not set"),
        ("slots: 64", "slots: 0", "slots must be"),
        ("slots: 64", "slots: [", "not YAML"),
        ("latency_limit: 10", "latency_limit: -1", "latency_limit must be a number above 0"),
    ],
)
def test_a_bad_cluster_file_is_one_clear_line(tmp_path, capsys, old, new, words):
    path = write_cluster(tmp_path / "experts.yaml", [MockServer(), MockServer()])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert words in run_main(capsys, "shortest_queue", "--cluster", str(path))


def test_bad_arguments_are_one_clear_line(tmp_path, capsys):
    path = write_cluster(tmp_path / "experts.yaml", [MockServer()])
    assert "unknown router 'shortest_que'" in run_main(capsys, "shortest_que", "--cluster", str(path))
    assert "has no config.yaml" in run_main(capsys, str(tmp_path), "--cluster", str(path))
    for name in ("clairvoyant", "rollout_clairvoyant"):
        assert "true lengths" in run_main(capsys, name, "--cluster", str(path))
    assert "too slow" in run_main(capsys, "rollout", "--cluster", str(path))
    assert "cannot be read" in run_main(capsys, "shortest_queue", "--cluster", str(tmp_path / "no.yaml"))
    assert "must be from 0" in run_main(capsys, "shortest_queue", "--cluster", str(path), "--port", "70000")
    predictor = ("--predictor", str(tmp_path))
    assert "jaxroute predict train" in run_main(capsys, "shortest_queue", "--cluster", str(path), *predictor)
    record = ("--record", str(tmp_path / "no" / "log.jsonl"))
    assert "cannot be written" in run_main(capsys, "shortest_queue", "--cluster", str(path), *record)


def test_options_that_streams_do_not_show_are_left_out(tmp_path):
    path = write_cluster(tmp_path / "experts.yaml", [MockServer(), MockServer()])
    engine = {"latency": [0.01, 1e-5, 1e-5, 1e-7], "num_gpu_blocks": 900, "async_scheduling": True}
    (tmp_path / "own.yaml").write_text(json.dumps({"name": "own", "engine": engine}))
    old = "latency: [0.015, 7.2e-5, 5e-5, 2.5e-5], kv_blocks: 875, max_num_seqs: 64"
    path.write_text(path.read_text().replace(old, f"profile: {tmp_path / 'own.yaml'}", 1))
    engines = load_cluster(path).engines
    assert not engines.async_scheduling and engines.usable_blocks.tolist() == [899, 875]


def test_a_port_in_use_is_one_clear_line(tmp_path):
    path = write_cluster(tmp_path / "experts.yaml", [MockServer()])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "jaxroute.serve", "shortest_queue", "--cluster", str(path), "--port", port]
        done = subprocess.run(command, env={**os.environ, **compile_fast()}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "is down" not in line]
    assert re.fullmatch(rf"error: --port {port}: cannot be used on 127.0.0.1 \(.*\); choose another port", line)


def test_the_record_is_what_calibrate_reads(tmp_path):
    async def run():
        async with mock_servers(1, gap=0.002) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers)
            log = Log(tmp_path / "log.jsonl", ["e0"])
            async with front_end(path, log=log) as (_, session):
                for number in range(22):
                    await post(session, {**CHAT, "max_tokens": 3 + number % 4})
                servers[0].faults = {"cut": 1.0}
                await stream(session, CHAT)

    asyncio.run(run())
    log = load_log(tmp_path / "log.e0.jsonl")
    assert len(log) == 22 and log.reading is not None and log.reading.format == "jaxroute serve"
    assert log.reading.left_out == {"failed or cancelled": 1}
    assert (log.prompt_tokens == 7).all() and log.output_tokens.tolist() == [3 + number % 4 for number in range(22)]
    assert (log.measured["tpot"] > 0.0015).all()
    lines = [json.loads(line) for line in (tmp_path / "log.e0.jsonl").read_text().splitlines()]
    assert lines[-1]["outcome"] == "failed" and "five words" not in str(lines)


@pytest.mark.parametrize(("kind", "features"), [("han", "standard"), ("flat", "standard"), ("han", "relative")])
def test_a_run_is_a_router_with_its_own_limit_scale_and_features(tmp_path, kind, features):
    network = [f"network.kind={kind}", "network.hidden=8", "network.heads=2", "network.layers=1", "network.mlp=[4]"]
    own = ["environment.slots=8", "environment.latency_limit=0.02", f"environment.features={features}"]
    config = load_config(None, [*network, *own])
    experiment, run = build_experiment(config), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_text(config))
    observation, state = experiment.env.reset(jax.random.key(0), experiment.params)
    trained = experiment.network.init(jax.random.key(1), observation)
    save_checkpoint(run, trained)
    path = write_cluster(tmp_path / "experts.yaml", [MockServer() for _ in range(3)])
    env, router, params = router_of(str(run), load_cluster(path))
    assert float(params.latency_limit) == 10 and float(params.token_scale) == 256 and env.slots == 64
    path.write_text(path.read_text().replace("latency_limit: 10", ""))
    env, router, params = router_of(str(run), load_cluster(path))
    assert float(params.latency_limit) == pytest.approx(0.02)
    # On an idle cluster of the same engines it decides as in the environment.
    asked = Asked(
        int(state.request.prompt_tokens),
        np.asarray(state.request.predicted_output_tokens),
        np.asarray(state.request.predicted_score),
        0.02,
    )
    decided = Decider(env, router, params)(Ledger(3, env.slots, np.full(3, 0.015)), 1.0, asked, np.full(3, True))
    wanted = int(policy_router(experiment.network, trained)(jax.random.key(0), observation, state, experiment.params))
    assert decided.expert == (wanted if wanted < 3 else None)


def test_the_universal_router_needs_no_training(tmp_path):
    """On idle servers that are alike but for their scores, the best one; on a full one the other."""
    path = write_cluster(tmp_path / "experts.yaml", [MockServer() for _ in range(2)])
    env, router, params = router_of("universal", load_cluster(path))
    asked = Asked(20, np.full(2, 50, np.int32), np.array([0.5, 0.8], np.float32), 10.0)
    decide, ledger = Decider(env, router, params), Ledger(2, env.slots, np.full(2, 0.015))
    assert decide(ledger, 1.0, asked, np.full(2, True)).expert == 1
    assert decide(ledger, 1.0, asked, np.array([True, False])).expert == 0


def test_the_sidecar_routes_for_others(tmp_path):
    async def run():
        async with mock_servers(2) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers, slots=1)
            async with front_end(path) as (one, session):
                ledger = one.dispatcher.ledger
                asked = {"text": "Say five words.", "max_tokens": 9, "limit": 30, "predicted_tokens": {"e1": 5}}
                status, _, first = await post(session, asked, "/route")
                assert status == 200 and first["expert"] == "e0" and first["url"] == servers[0].url
                _, _, second = await post(session, {"prompt_tokens": 12}, "/route")
                assert second["expert"] == "e1" and ledger.count.tolist() == [1, 1]
                _, _, third = await post(session, asked, "/route")
                assert third["expert"] is None and "queues are full" in third["reason"] and third["retry_after"] >= 1
                for tokens in (1, 2, 3):
                    await post(session, {"id": first["id"], "tokens": tokens, "prompt_tokens": 8}, "/event")
                _, _, answer = await post(session, {"id": first["id"], "tokens": 4, "end": "completed"}, "/event")
                assert answer["tokens"] == 4 and ledger.count.tolist() == [0, 1]
                for body, wanted, words in [
                    ({"id": first["id"], "end": "completed"}, 404, "No request"),
                    ({"id": second["id"], "end": "well"}, 400, "end must be one of"),
                    ({"id": second["id"], "tokens": -1}, 400, "tokens must be"),
                    ({}, 404, "No request"),
                ]:
                    status, _, answer = await post(session, body, "/event")
                    assert status == wanted and words in answer["error"]["message"]
                for body, words in [
                    ({}, "Give the text"),
                    ({"text": 5}, "text must be"),
                    ({"prompt_tokens": 0}, "prompt_tokens must be"),
                    ({"text": "x", "limit": -1}, "above 0"),
                    ({"text": "x", "predicted_tokens": {"e7": 5}}, "there is no expert 'e7'"),
                    ({"text": "x", "predicted_scores": {"e0": "high"}}, "is not a prediction"),
                ]:
                    status, _, answer = await post(session, body, "/route")
                    assert status == 400 and words in answer["error"]["message"]
                await post(session, {"id": second["id"], "end": "failed"}, "/event")
                assert ledger.open == 0

    asyncio.run(run())


def test_a_gateway_that_forgets_a_request_leaks_nothing(tmp_path, monkeypatch):
    async def run():
        monkeypatch.setattr("jaxroute.serving.sidecar.EXPIRY", 0.2)
        async with mock_servers(1) as servers:
            async with front_end(write_cluster(tmp_path / "c.yaml", servers)) as (one, session):
                await post(session, {"text": "x"}, "/route")
                assert one.dispatcher.ledger.open == 1
                async with asyncio.timeout(5):
                    while one.dispatcher.ledger.open:
                        await asyncio.sleep(0.05)

    asyncio.run(run())
