"""Servers that fail at random and clients that leave at random: every request ends once, and nothing is left."""

from __future__ import annotations

import asyncio
import logging

import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from jaxroute.serving.front_end import Limits  # noqa: E402
from tests.live_chaos import chaos  # noqa: E402
from tests.live_front_end import front_end, write_cluster  # noqa: E402
from tests.mock_servers import mock_servers  # noqa: E402

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


def _samples(statistics, name):
    metrics = statistics.registry.collect()
    return [sample for metric in metrics for sample in metric.samples if sample.name == name]
