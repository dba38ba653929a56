"""Measures `jaxroute serve` against mock servers: chaos, decisions, CPU, open streams and memory.

The servers and the clients run in this process, the front end in one of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.harness import Parser, Row, machine
from jaxroute.errors import command
from jaxroute.files import write_text
from tests.live_chaos import chaos
from tests.live_front_end import process, write_cluster
from tests.mock_servers import MockServer, mock_servers

PARTS = ("chaos", "decisions", "chunks", "streams", "memory")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Memory of a process, MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def completion(session: aiohttp.ClientSession, tokens: int) -> bool:
    """Whether a streamed request ended well."""
    body = {"prompt": "x", "max_tokens": tokens, "stream": True}
    async with session.post("/v1/completions", json=body) as answer:
        data = await answer.read()
        return answer.status == 200 and data.endswith(b"data: [DONE]\n\n")


async def batch(session: aiohttp.ClientSession, requests: int, at_once: int, tokens: int) -> int:
    """Number of requests, of so many at once, that ended well."""
    numbers, well = iter(range(requests)), 0

    async def client() -> None:
        nonlocal well
        for _ in numbers:
            result = await completion(session, tokens)
            well += result

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(client())
    return well


async def metric(session: aiohttp.ClientSession, name: str) -> dict[str, float]:
    """The samples of a metric, by their labels."""
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = [line for line in lines if line.startswith((name + "{", name + " "))]
    return {line.rsplit(" ", 1)[0].removeprefix(name): float(line.rsplit(" ", 1)[1]) for line in found}


async def run_chaos(session: aiohttp.ClientSession, address: str, servers: list[MockServer], quick: bool) -> Row:
    """Servers fail and crash, clients leave; afterwards nothing is open."""
    requests = 1000 if quick else 10_000
    started = time.monotonic()
    ends: Counter[str] = await chaos(address, requests, 48, servers, kill_every=1.0)
    open_after = -1.0
    for _ in range(200):
        open_after = sum((await metric(session, "jaxroute_open")).values())
        if open_after == 0:
            break
        await asyncio.sleep(0.05)
    sent = sum((await metric(session, "jaxroute_sent_total")).values())
    ended = sum((await metric(session, "jaxroute_ended_total")).values())
    return {
        "requests": requests,
        "seconds": round(time.monotonic() - started, 1),
        "ends": dict(ends),
        "ended once": sum(ends.values()) == requests and sent == ended,
        "open afterwards": open_after,
    }


async def run_decisions(session: aiohttp.ClientSession, quick: bool) -> Row:
    """Time of prediction and decision at 50 requests/s."""
    rng, requests = random.Random(0), 500 if quick else 3000
    async with asyncio.TaskGroup() as group:
        for _ in range(requests):
            group.create_task(completion(session, 10))
            await asyncio.sleep(rng.expovariate(50))
    buckets = await metric(session, "jaxroute_decision_seconds_bucket")
    shares = {label.split('"')[1]: value / buckets['{le="+Inf"}'] for label, value in buckets.items()}
    return {
        "requests": requests,
        "share within": {f"{1000 * float(le):g} ms": round(value, 4) for le, value in shares.items()},
    }


async def run_chunks(session: aiohttp.ClientSession, pid: int, quick: bool) -> Row:
    """CPU time of a request and of a chunk, from answers of one token and of 100."""
    requests, cpu = 200 if quick else 1000, {}
    for tokens in (1, 101):
        await batch(session, 20, 8, tokens)
        before = cpu_seconds(pid)
        assert await batch(session, requests, 8, tokens) == requests
        cpu[tokens] = (cpu_seconds(pid) - before) / requests
    chunk = (cpu[101] - cpu[1]) / 100
    return {
        "requests": requests,
        "ms CPU a request": round(1e3 * (cpu[1] - chunk), 3),
        "ms CPU a chunk": round(1e3 * chunk, 4),
    }


async def run_streams(session: aiohttp.ClientSession, servers: list[MockServer]) -> Row:
    """2,000 streams that are open at once: 100 begin each second, with ten tokens in 40 s."""
    for server in servers:
        server.gap, server.most_open = 4.0, 0
    tasks: list[asyncio.Task[bool]] = []
    for _ in range(2000):
        tasks.append(asyncio.create_task(completion(session, 10)))
        await asyncio.sleep(0.01)
    well = sum(await asyncio.gather(*tasks))
    most = sum(server.most_open for server in servers)
    return {"streams": 2000, "open at once": most, "ended well": well}


async def run_memory(session: aiohttp.ClientSession, pid: int, quick: bool) -> Row:
    """Memory after each tenth of 100,000 requests."""
    requests, sizes = 5000 if quick else 100_000, []
    for _ in range(10):
        await batch(session, requests // 10, 32, 1)
        sizes.append(round(resident_mb(pid), 1))
    return {"requests": requests, "MB": sizes}


async def measure(parts: Sequence[str], router: str, quick: bool) -> Row:
    """The figures of each part, with a front end of its own."""
    rows: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            gap = 0.002 if part in ("chaos", "chunks") else 0.0  # chunks that come one by one
            async with mock_servers(3, gap) as servers:
                for server in servers:
                    server.keep = False
                slots = 1024 if part == "streams" else 64
                path = write_cluster(Path(folder) / "experts.yaml", servers, slots)
                arguments = (router, "--cluster", str(path), "--silent-seconds", "2" if part == "chaos" else "60")
                async with process(Path(folder), *arguments, fast=False) as served:
                    connector, pid = aiohttp.TCPConnector(limit=0), served.process.pid
                    async with aiohttp.ClientSession(served.address, connector=connector) as session:
                        match part:
                            case "chaos":
                                rows[part] = await run_chaos(session, served.address, servers, quick)
                            case "decisions":
                                rows[part] = await run_decisions(session, quick)
                            case "chunks":
                                rows[part] = await run_chunks(session, pid, quick)
                            case "streams":
                                rows[part] = await run_streams(session, servers)
                            case _:
                                rows[part] = await run_memory(session, pid, quick)
                    served.process.terminate()
                    errors = await served.ended()
                rows[part] |= {"load": round(os.getloadavg()[0], 1), "exceptions": errors.count("Traceback")}
                print(part, json.dumps(rows[part]), flush=True)
    return rows


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("live.__main__", __doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--router", default="shortest_queue", help="name or run folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    arguments = parser.read(argv)
    rows = uvloop.run(measure(arguments.parts or PARTS, arguments.router, arguments.quick))
    if arguments.json:
        write_text(
            arguments.json,
            json.dumps({"machine": machine(argv, "live"), "router": arguments.router, **rows}, indent=2) + "\n",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
