"""Servers that fail at random and clients that leave at random: every request ends once, and nothing is left."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections import Counter

import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

import aiohttp  # noqa: E402

from jaxroute.serving.front_end import Limits  # noqa: E402
from tests.live_chaos import chaos  # noqa: E402
from tests.live_front_end import front_end, write_cluster  # noqa: E402
from tests.mock_servers import MockServer, mock_servers  # noqa: E402

REQUESTS = 400  # `python -m benchmarks.live chaos` sends 10,000


def test_every_request_ends_once(tmp_path, caplog):
    async def run():
        async with mock_servers(3, gap=0.002) as servers:
            path = write_cluster(tmp_path / "c.yaml", servers, slots=16)
            limits = Limits(silent_seconds=1.0)
            async with front_end(path, limits=limits) as (one, session):
                ends = await chaos(str(session._base_url), REQUESTS, 24, servers, kill_every=0.5)
                async with asyncio.timeout(10):
                    while one.open or one.dispatcher.ledger.open:
                        await asyncio.sleep(0.05)
                statistics = one.dispatcher.statistics
                assert sum(ends.values()) == REQUESTS
                assert ends["whole"] > 50 and ends["streamed"] > 50
                assert one._watched == set() and one._busy == {}
                sent = {sample.labels["expert"]: sample.value for sample in _samples(statistics, "jaxroute_sent_total")}
                for name, counts in statistics.totals.items():
                    ended = sum(counts[key] for key in ("completed", "failed", "cancelled", "refused"))
                    assert ended == sent[name]
                async with asyncio.timeout(10):
                    while any(server.open for server in servers):
                        await asyncio.sleep(0.05)
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

    asyncio.run(run())


def test_a_server_that_is_killed_loses_what_it_streams_and_comes_back(tmp_path, caplog):
    async def start(port: int) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "tests.mock_servers", str(port), "0.05")
        return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)

    async def run():
        killed = await start(0)
        assert killed.stdout is not None
        fated, other = MockServer(), MockServer(gap=0.05)
        fated.port = int(await killed.stdout.readline())
        await other.start()
        path = write_cluster(tmp_path / "c.yaml", [fated, other])
        async with front_end(path) as (one, session):
            address, ends = str(session._base_url), Counter[str]()
            ledger, numbers = one.dispatcher.ledger, iter(range(60))

            async def client() -> None:
                async with aiohttp.ClientSession(address) as own:
                    for number in numbers:
                        body = {"prompt": "x", "max_tokens": 12, "stream": True, "user": str(number)}
                        async with own.post("/v1/completions", json=body) as answer:
                            data = await answer.read()
                        ends["well" if data.endswith(b"data: [DONE]\n\n") else "broken"] += 1

            clients = [asyncio.create_task(client()) for _ in range(12)]
            while ends["well"] < 12 or ledger.count[0] < 3:
                await asyncio.sleep(0.01)
            open_there = int(ledger.count[0])
            killed.send_signal(signal.SIGKILL)
            await killed.wait()
            while one.dispatcher.up[0]:
                await asyncio.sleep(0.01)
            again = await start(fated.port)
            async with asyncio.timeout(20):
                while not one.dispatcher.up[0]:
                    await asyncio.sleep(0.02)
                await asyncio.gather(*clients)
            assert ends["well"] + ends["broken"] == 60 and ends["broken"] <= open_there
            before = one.dispatcher.statistics.totals["e0"]["completed"]
            async with session.post("/v1/completions", json={"prompt": "x"}) as answer:
                assert answer.headers["X-Jaxroute-Expert"] == "e0"
            assert one.dispatcher.statistics.totals["e0"]["completed"] == before + 1 and ledger.open == 0
            again.kill()
            await again.wait()
        await other.stop()
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

    asyncio.run(run())


def _samples(statistics, name):
    metrics = statistics.registry.collect()
    return [sample for metric in metrics for sample in metric.samples if sample.name == name]
