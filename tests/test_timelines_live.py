"""The timeline of live traffic: the record of a front end, live beside simulated."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from jaxroute.commands.timeline import main  # noqa: E402
from jaxroute.serving.log import Log  # noqa: E402
from jaxroute.timelines.collect import DROPPED, MET, MISSED  # noqa: E402
from jaxroute.timelines.live import live_episodes, load_record  # noqa: E402
from tests.live_front_end import front_end, write_cluster  # noqa: E402
from tests.mock_servers import mock_servers  # noqa: E402
from tests.test_serving_front_end import CHAT, post, stream  # noqa: E402
from tests.test_timeline import CHROMIUM  # noqa: E402


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Twelve requests, of which one is cut, one is too slow and two are dropped; it holds an earlier run too."""
    folder = tmp_path_factory.mktemp("record")

    async def run(requests: int) -> None:
        async with mock_servers(2, gap=0.02) as servers:
            path, log = write_cluster(folder / "c.yaml", servers, slots=4), Log(folder / "log.jsonl", ["e0", "e1"])
            async with front_end(path, log=log) as (_, session):
                await asyncio.gather(*(post(session, CHAT) for _ in range(requests)))
                if requests > 2:
                    await post(session, CHAT, headers={"X-Jaxroute-Limit": "1"})
                    servers[0].faults = servers[1].faults = {"cut": 1.0}
                    await stream(session, CHAT)

    asyncio.run(run(2))
    asyncio.run(run(10))
    return folder / "log.jsonl"


def test_a_record_is_drawn_live_and_simulated(record, tmp_path, capsys):
    loaded = load_record(record)
    assert loaded.experts == ("e0", "e1") and loaded.router == "shortest_queue"
    assert loaded.engines.usable_blocks.tolist() == [875, 875]
    live, simulated = live_episodes(loaded)
    fates = live.requests.fate
    assert (fates == DROPPED).sum() == 2 and (fates == MET).sum() == 8 and (fates == MISSED).sum() >= 1
    assert (
        simulated.requests.fate == DROPPED
    ).sum() == 2 and simulated.requests.expert.tolist() == loaded.expert.tolist()
    assert (simulated.requests.output_tokens[fates <= MISSED] == live.requests.output_tokens[fates <= MISSED]).all()
    assert live.metrics["qos"] == pytest.approx(sum(live.requests.score[fates == MET]) / len(fates))
    assert live.pieces.running.max() == 4 and not live.pieces.iterations.any()
    assert main([str(record), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Live, shortest_queue: QoS") and lines[1].startswith("Simulated: QoS")
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {"streaming", "waiting", "decode"} <= {event["name"] for event in events}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(record, tmp_path):
    main([str(record), "--out", str(tmp_path / "out")])
    command = (str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    page = f"file://{tmp_path / 'out' / 'timeline.html'}"
    done = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert 'data-ready="' in done.stdout and "Live, shortest_queue" in done.stdout
    drawn = sum(int((one.requests.fate < DROPPED).sum()) for one in live_episodes(load_record(record)))
    assert f'data-bars="{drawn}"' in done.stdout


def test_what_is_no_record_is_one_clear_line(record, tmp_path, capsys):
    notes = [json.loads(line) for line in record.read_text().splitlines()]
    start = next(note for note in notes if "experts" in note)
    unmeasured = {**start, "experts": [{**start["experts"][0], "engine": None}]}
    cases = [
        ("", [str(record.with_name("log.e0.jsonl"))], "no cluster in it"),
        (json.dumps(unmeasured) + "\n", [], "the engine of e0 had not been measured"),
        (json.dumps({**start, "run": "none"}) + "\n", [], "no request in it"),
        ("", [str(record), "round_robin"], "a record is drawn alone; leave out round_robin"),
    ]
    for name in ("log.e0.jsonl", "log.e1.jsonl"):
        shutil.copy(record.with_name(name), tmp_path)
    for text, words, wanted in cases:
        (tmp_path / "log.jsonl").write_text(text)
        assert main([*(words or [str(tmp_path / "log.jsonl")]), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1
