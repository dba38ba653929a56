"""A front end in front of mock servers, in the process of the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jax

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import params_of
from jaxroute.routers import make_router
from jaxroute.serving.cluster import Cluster, load_cluster
from jaxroute.serving.decision import Decider
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.front_end import FrontEnd, Limits
from jaxroute.serving.log import Log
from jaxroute.serving.openai import Limit
from jaxroute.serving.predictions import Predictions
from jaxroute.serving.server import serve
from jaxroute.serving.statistics import Statistics
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload
from tests.compiling import compile_fast
from tests.mock_servers import MockServer

CLUSTER = """\
slots: {slots}
latency_limit: 10
experts:
{experts}
"""


def write_cluster(path: Path, servers: Sequence[MockServer], slots: int = 64) -> Path:
    """The file of a cluster of these servers."""
    lines = [
        f"  - {{name: e{number}, url: '{server.url}', model: mock, mean_score: 0.{7 - number}, "
        "latency: [0.015, 7.2e-5, 5e-5, 2.5e-5], kv_blocks: 875, max_num_seqs: 64}"
        for number, server in enumerate(servers)
    ]
    path.write_text(CLUSTER.format(slots=slots, experts="\n".join(lines)), encoding="utf-8")
    return path


def make_dispatcher(
    cluster: Cluster, router: str = "shortest_queue", log: Log | None = None, **options: Any
) -> Dispatcher:
    """A dispatcher of this cluster."""
    count, scores = len(cluster.experts), [expert.mean_score for expert in cluster.experts]
    env = RoutingEnvironment(num_experts=count, slots=cluster.slots, penalty="off", metrics="off", **options)
    workload = Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create(scores))
    params = params_of(workload, cluster.engines, cluster.latency_limit or 0.03, 256.0)
    names = [expert.name for expert in cluster.experts]
    decider = Decider(env, make_router(router, env), params)
    limit = Limit(per_token=float(params.latency_limit))
    if log is not None:
        log.begin(router, cluster, params.engines, limit.of(1))
    dispatcher = Dispatcher(cluster, decider, Predictions(names, scores, None), limit, Statistics(names, log))
    dispatcher.warm_up()
    return dispatcher


@contextlib.asynccontextmanager
async def front_end(
    path: Path,
    router: str = "shortest_queue",
    limits: Limits | None = None,
    api_key: str | None = None,
    log: Log | None = None,
    drain_seconds: float = 5.0,
    **options: Any,
) -> AsyncIterator[tuple[FrontEnd, aiohttp.ClientSession]]:
    """A front end for the cluster of this file, and a client's session with its address as base."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    dispatcher = make_dispatcher(load_cluster(path), router, log, **options)
    one = FrontEnd(dispatcher, limits or Limits(), api_key)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(one, "127.0.0.1", 0, drain_seconds, port.set_result))
    await asyncio.wait([task, port], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{await port}") as session:
            yield one, session
    finally:
        one.stopping.set()
        await task


class Served(NamedTuple):
    """The command as a process."""

    process: asyncio.subprocess.Process
    lines: list[str]  # that it printed at its start
    address: str
    errors: Path  # what it writes to standard error

    async def ended(self) -> str:
        """What it wrote to standard error, once it has ended; it must have printed no more."""
        assert self.process.stdout is not None
        assert await self.process.stdout.read() == b""
        await self.process.wait()
        return self.errors.read_text()


@contextlib.asynccontextmanager
async def process(folder: Path, *arguments: str, fast: bool = True, **environment: str) -> AsyncIterator[Served]:
    """The command as a process. `fast`: its programs compile fast, and run slowly."""
    command = [sys.executable, "-m", "jaxroute.serve", *arguments, "--port", "0"]
    env = {**os.environ, **(compile_fast() if fast else {}), **environment}
    errors = folder / "errors.txt"
    with errors.open("wb") as file:
        running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=file, env=env)
    try:
        lines: list[str] = []
        assert running.stdout is not None
        while not (found := re.search(r"status at (http://\S+?)/$", lines[-1] if lines else "")):
            line = (await running.stdout.readline()).decode().rstrip()
            assert line, errors.read_text()
            lines.append(line)
        yield Served(running, lines, found[1], errors)
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
