"""Live against simulated: a router in front of real vLLM servers, and the same requests in the environment.

`python -m benchmarks.live.cluster index_rule round_robin` replays requests of `paper-3` (`--environment`). For each
router: the share of decisions that equal the router's own on the simulated states of the same choices; errors of the
times of requests against the simulation of these choices; and the QoS of both. Times are divided by the time scale.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import uvloop

from benchmarks.harness import Parser, Row, count, machine, rate
from benchmarks.live.vllm_servers import vllm_servers
from jaxroute.agent.trainer import policy_router
from jaxroute.config.build import build_network
from jaxroute.config.loader import load_saved_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import make
from jaxroute.environment.state import EnvParams
from jaxroute.errors import command
from jaxroute.evaluation.tuning import tuned_routers
from jaxroute.files import write_text
from jaxroute.routers import ROUTERS
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params
from jaxroute.serving.call import Call
from jaxroute.serving.cluster import Cluster, Expert
from jaxroute.serving.decision import Decider
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.front_end import FrontEnd, Limits
from jaxroute.serving.openai import Completion, Limit
from jaxroute.serving.predictions import Predictions
from jaxroute.serving.server import serve
from jaxroute.serving.statistics import Statistics
from jaxroute.workload import PoissonArrivals
from tests.live_streams import token_times
from tests.rollouts import Run, rollout, with_engines

WORD = 3  # the id of the word w0
ENVIRONMENTS = ("paper-3", "paper-6")  # of the engines that start_sleep.sh can start: 64 seats, no knee, no prefixes
TUNING = 40_000  # decisions for each router, a tenth of what an evaluation spends


class Live(NamedTuple):
    """What was seen of T requests; times in s since the request, divided by the time scale, nan without an answer."""

    actions: np.ndarray  # int32 [T]
    first_token: np.ndarray
    finish: np.ndarray
    tokens: np.ndarray  # int [T]
    late: np.ndarray  # s by which the request was sent after its time
    chunks: np.ndarray  # float [C, 3] in order: time in s since the first decision, request, tokens up to then
    decided: np.ndarray  # float [T], time of each decision


class Recorder(Dispatcher):
    """Keeps the time of every decision and chunk, on the dispatcher's clock."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.chunks: list[tuple[float, int, int]] = []
        self.decided: dict[int, float] = {}

    def begin(self, call: Call, without: int | None = None) -> int:
        self.decided[int(call.asked.body["user"])] = call.arrival
        return super().begin(call, without)

    def progress(self, call: Call, tokens: int, prompt_tokens: int | None) -> None:
        self.chunks.append((self.clock(), int(call.asked.body["user"]), tokens))
        super().progress(call, tokens, prompt_tokens)


class Recorded(Predictions):
    """The predictions of the simulated requests, which a request names by its number."""

    def __init__(self, run: Run):
        request = run.before.request
        self._given = request.predicted_score, request.predicted_output_tokens

    def __call__(self, asked: Completion) -> tuple[np.ndarray, np.ndarray]:
        number = int(asked.body["user"])
        return self._given[0][number].astype(np.float32), self._given[1][number].astype(np.int32)

    def learn(self, expert: int, asked: Completion, prompt_tokens: int | None, output_tokens: int) -> None:
        """Nothing: predictions are given."""


def prompt_of(run: Run, number: int) -> list[int]:
    """Tokens of a prompt, of which the first say how long each server's answer is."""
    answers = run.before.request.output_tokens[number]
    length = int(run.before.request.prompt_tokens[number])
    filling = (np.arange(length) * 7 + number) % 4000
    filling[: len(answers)] = answers[:length]
    return [WORD + int(word) for word in filling]


def scaled(params: EnvParams, scale: float) -> EnvParams:
    """The same cluster on a clock that is slower by `scale`."""
    engines = params.engines
    names = [name for name in engines.latency.__dataclass_fields__ if name != "knee_tokens"]
    latency = engines.latency.replace(**{name: getattr(engines.latency, name) * scale for name in names})
    return params.replace(latency_limit=params.latency_limit * scale, engines=engines.replace(latency=latency))


async def run_live(
    env: RoutingEnvironment, params: EnvParams, router: Router, run: Run, addresses: Sequence[str], scale: float
) -> Live:
    """Sends the requests of the run at their times through a front end in this process."""
    experts = tuple(Expert(f"e{number}", url, "tiny", 0.7, None) for number, url in enumerate(addresses))
    slow = scaled(params, scale)
    cluster = Cluster(experts, slow.engines, "jaxroute", env.slots, float(slow.latency_limit), None)
    limit = Limit(per_token=float(slow.latency_limit))
    names = [expert.name for expert in experts]
    dispatcher = Recorder(cluster, Decider(env, router, slow), Recorded(run), limit, Statistics(names))
    dispatcher.warm_up()
    front_end = FrontEnd(dispatcher, Limits(silent_seconds=120.0))
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(front_end, "127.0.0.1", 0, 5.0, port.set_result))
    total = len(run.reward)
    actions = np.full(total, env.num_experts, np.int32)
    first, finish, late = np.full(total, np.nan), np.full(total, np.nan), np.zeros(total)
    tokens = np.zeros(total, int)
    times = np.concatenate([[0.0], np.cumsum(run.info["elapsed"][:-1])]) * scale

    async def send(session: aiohttp.ClientSession, number: int) -> None:
        body: dict[str, Any] = {"prompt": prompt_of(run, number), "max_tokens": 300, "user": str(number)}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"stream": True, "stream_options": usage}
        sent = time.monotonic()
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                assert answer.status == 429, await answer.text()
                return
            actions[number] = names.index(answer.headers["X-Jaxroute-Expert"])
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    seen = event["usage"]["completion_tokens"]
                    if seen > tokens[number]:
                        now = (time.monotonic() - sent) / scale
                        first[number] = now if np.isnan(first[number]) else first[number]
                        finish[number], tokens[number] = now, seen

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{await port}", connector=connector) as session:
        start = time.monotonic() + 0.5
        async with asyncio.TaskGroup() as group:
            for number, at in enumerate(times):
                await asyncio.sleep(max(start + at - time.monotonic(), 0))
                late[number] = (time.monotonic() - start - at) / scale
                group.create_task(send(session, number))
    front_end.stopping.set()
    await task
    begin = dispatcher.decided[0]
    chunks = [((at - begin) / scale, request, seen) for at, request, seen in dispatcher.chunks]
    decided = [(dispatcher.decided[number] - begin) / scale for number in range(total)]
    return Live(actions, first, finish, tokens, late, np.array(chunks), np.array(decided))


def simulated(env: RoutingEnvironment, params: EnvParams, router: Router, key: jax.Array, actions: np.ndarray) -> Any:
    """The run of the environment under `actions`, and what the router chooses at each of its states."""

    def program(router: Any, params: EnvParams, actions: jax.Array) -> tuple[Run, jax.Array]:
        run = rollout(env, params, key, actions)
        choose = lambda state: router(jax.random.key(0), env.observe(state, params), state, params)  # noqa: E731
        return run, jax.lax.map(choose, run.before)

    return jax.device_get(jax.jit(program)(router, params, jnp.asarray(actions)))


def compared(env: RoutingEnvironment, params: EnvParams, run: Run, chosen: np.ndarray, live: Live) -> Row:
    """Live against the simulation of the same choices."""
    streams = token_times(env, params, run, live.actions)
    total, limit = len(live.actions), float(params.latency_limit)
    arrival = np.concatenate([[0.0], np.cumsum(run.info["elapsed"][:-1])])
    served = np.array([bool(stream) for stream in streams])
    finish = np.array([stream[-1] if stream else np.nan for stream in streams]) - arrival
    first = np.array([stream[0] if stream else np.nan for stream in streams]) - arrival
    length = np.array([max(len(stream), 1) for stream in streams])
    choice = np.minimum(live.actions, env.num_experts - 1)
    score = run.before.request.score[np.arange(total), choice]

    def qos(latency: np.ndarray) -> float:
        return float(np.where(np.nan_to_num(latency, nan=np.inf) < limit, score, 0).sum() / total)

    def median_error(real: np.ndarray, model: np.ndarray) -> float:
        return round(float(np.median(np.abs(real - model)[served] / model[served])), 4)

    per_token = live.finish / np.maximum(live.tokens, 1)
    return {
        "requests": total,
        "dropped": int((live.actions == env.num_experts).sum()),
        "same choices": round(float((chosen == live.actions).mean()), 4),
        "same lengths": bool((live.tokens[served] == length[served]).all()),
        "preemptions of completed requests, simulated": int(run.info["episode"].preemptions[-1].sum()),
        "qos live": round(qos(per_token), 4),
        "qos of these choices, simulated": round(qos(finish / length), 4),
        "median error per token": median_error(per_token, finish / length),
        "median error end to end": median_error(live.finish, finish),
        "median error to first token": median_error(live.first_token, first),
        "first token later by, ms": round(1000 * float(np.median((live.first_token - first)[served])), 2),
        "ms per token, live and simulated": [
            round(1000 * float(np.mean(v[served])), 2) for v in (per_token, finish / length)
        ],
        "sent late, ms, p99": round(1000 * float(np.quantile(live.late, 0.99)), 2),
    }


def router_of(name: str, env: RoutingEnvironment, params: EnvParams) -> Router:
    """A router by name, tuned in the simulator, or that of a run's folder."""
    if name in ROUTERS:
        return tuned_routers(env, params, [name], decisions=TUNING)[name]
    network = build_network(load_saved_config(Path(name) / "config.yaml").network)
    return policy_router(network, load_params(Path(name), network, env, params))


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("live.cluster", __doc__)
    parser.add_argument("routers", nargs="+", help="names, or folders of runs")
    parser.add_argument("--environment", choices=ENVIRONMENTS, default="paper-3", help="default: %(default)s")
    parser.add_argument("--requests", type=count, default=120, help="default: %(default)s")
    parser.add_argument("--rate", type=rate, default=3.0, help="requests/s (default: %(default)s)")
    parser.add_argument("--blocks", type=count, help="KV blocks of each server (default: those of the environment)")
    parser.add_argument("--scale", type=rate, default=2.0, help="how much slower the clock is (default: %(default)s)")
    parser.add_argument("--streams", type=Path, metavar="PATH.npz", help="write the last router's chunks to this file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    arguments = parser.read(argv)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    env, params = make(arguments.environment, penalty="off", episode_length=arguments.requests + 1)
    workload = dataclasses.replace(params.workload, arrivals=PoissonArrivals.create(arguments.rate))
    params = params.replace(workload=workload)
    if arguments.blocks:
        own = {"usable_blocks": arguments.blocks, "max_model_len": min(16 * arguments.blocks, 8192)}
        params = with_engines(params, **{key: [value] * env.num_experts for key, value in own.items()})
    key, nobody = jax.random.key(20), np.full(arguments.requests, env.num_experts, np.int32)
    engines = params.engines
    columns = (engines.latency.base, engines.latency.per_prefill_token, engines.latency.per_decode)
    latencies = np.stack(
        [np.asarray(column, float) for column in (*columns, engines.latency.per_context_token)], axis=1
    )
    rows: Row = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_servers(
            latencies.round(9).tolist(),
            np.asarray(engines.usable_blocks).tolist(),
            int(engines.max_model_len[0]),
            arguments.scale,
            Path(folder),
        ) as addresses,
    ):
        for name in arguments.routers:
            router = router_of(name, env, params)
            first, _ = simulated(env, params, router, key, nobody)
            live = uvloop.run(run_live(env, params, router, first, addresses, arguments.scale))
            run, chosen = simulated(env, params, router, key, live.actions)
            rows[name] = compared(env, params, run, chosen, live) | {"load": round(os.getloadavg()[0], 1)}
            print(name, json.dumps(rows[name]), flush=True)
            if arguments.streams:
                np.savez_compressed(
                    arguments.streams,
                    actions=live.actions,
                    chunks=live.chunks.astype(np.float32),
                    decided=live.decided.astype(np.float32),
                )
    if arguments.json:
        settings = {key: getattr(arguments, key) for key in ("environment", "rate", "blocks", "scale")}
        write_text(
            arguments.json, json.dumps({"machine": machine(argv, "live.cluster"), **settings, **rows}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
