"""`jaxroute serve` in front of vLLM servers of which it is told only the URLs, and vLLM's own benchmark as its client.

`auto`: servers of two profiles (sleeping executors) are measured; the coefficients are compared with what they sleep.
`client`: `vllm bench serve --save-detailed` against a front end with one of them, and `jaxroute calibrate` on its file.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import numpy as np
import uvloop
import yaml

from benchmarks.harness import Parser, Row, count, machine, rate
from benchmarks.live.vllm_servers import folders, vllm_servers
from jaxroute.errors import command
from jaxroute.files import write_text
from tests.live_front_end import process

PARTS = ("auto", "client")
PROFILES = ([0.015, 7.2e-5, 5e-5, 2.5e-5], [0.025, 1.5e-4, 4e-4, 2e-6])
"""c0 to c3 of the servers, s; every second one is of the second kind."""

BLOCKS = 875
NAMES = ("c0", "c1", "c2", "c3")


def measured(record: Path) -> dict[str, list[float]]:
    """The latencies of the experts that a front end has measured, from its record."""
    notes = [json.loads(line) for line in record.read_text().splitlines()]
    return {note["measured"]: note["engine"]["latency"][:4] for note in notes if "measured" in note}


async def until_up(address: str, experts: int) -> float:
    """Seconds until all experts take part."""
    started = time.monotonic()
    async with aiohttp.ClientSession(address) as session:
        while time.monotonic() < started + 90 * experts:
            async with session.get("/status.json") as answer:
                if all(expert["up"] for expert in (await answer.json())["experts"]):
                    return time.monotonic() - started
            await asyncio.sleep(0.2)
    raise AssertionError("not all experts were measured")


async def ask(address: str, requests: int) -> int:
    """How many of these requests at 4 requests/s were answered whole."""

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        prompt = " ".join(f"w{(number * 17 + place) % 4000 + 40}" for place in range(50 + number))
        body = {"prompt": prompt, "max_tokens": 20, "ignore_eos": True}
        async with session.post("/v1/completions", json=body) as answer:
            return answer.status == 200 and (await answer.json())["usage"]["completion_tokens"] == 20

    async with aiohttp.ClientSession(address) as session:
        tasks = []
        for number in range(requests):
            tasks.append(asyncio.create_task(one(session, number)))
            await asyncio.sleep(0.25)
        return sum(await asyncio.gather(*tasks))


async def run_auto(folder: Path, addresses: Sequence[str], latencies: Sequence[list[float]]) -> Row:
    """Coefficients as they were measured, and whether requests are answered."""
    path, record = folder / "urls.yaml", folder / "auto.jsonl"
    path.write_text(yaml.safe_dump({"experts": [{"url": address} for address in addresses], "slots": 64}))
    arguments = ("shortest_queue", "--cluster", str(path), "--record", str(record))
    async with process(folder, *arguments, fast=False) as served:
        seconds, requests = await until_up(served.address, len(addresses)), 40
        answered = await ask(served.address, requests)
    found = measured(record)
    errors = np.array([found[f"expert{number}"] for number in range(len(addresses))]) / np.array(latencies) - 1
    return {
        "servers": len(addresses),
        "seconds until all were measured": round(seconds, 1),
        "worst relative error": {name: round(float(np.abs(errors[:, at]).max()), 4) for at, name in enumerate(NAMES)},
        "requests": requests,
        "answered": answered,
    }


async def run_client(folder: Path, address: str, latency: list[float]) -> Row:
    """vLLM's benchmark against the front end, and what `calibrate` says of its file."""
    path, result = folder / "one.yaml", folder / "result.json"
    expert = {"url": address, "model": "tiny", "latency": latency, "kv_blocks": BLOCKS, "max_num_seqs": 64}
    path.write_text(yaml.safe_dump({"experts": [expert], "slots": 64, "latency_limit": 10.0}))
    (folder / "engine.yaml").write_text(
        yaml.safe_dump({"max_num_seqs": 64, "max_num_batched_tokens": 2048, "num_gpu_blocks": BLOCKS + 1})
    )
    _, live = folders()
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env.pop("PYTHONPATH", None)
    async with process(folder, "shortest_queue", "--cluster", str(path), fast=False) as served:
        options = f"--backend openai --base-url {served.address} --endpoint /v1/completions --model jaxroute --seed 1 "
        options += f"--tokenizer {live / 'tiny'} --dataset-name random --random-input-len 150 --random-output-len 60 "
        options += "--random-range-ratio 0.9 --num-prompts 120 --request-rate 3 --ignore-eos --save-result "
        options += f"--save-detailed --result-filename {result}"
        python = str(live / "v33" / "bin" / "python")
        command_line = [python, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *options.split()]
        with (folder / "bench.log").open("wb") as log:
            running = await asyncio.create_subprocess_exec(*command_line, env=env, cwd=folder, stdout=log, stderr=log)
            assert await running.wait() == 0, (folder / "bench.log").read_text()[-2000:]
    data = json.loads(result.read_text())
    calibrate = [sys.executable, "-m", "jaxroute.calibrate", str(result), "--engine", str(folder / "engine.yaml")]
    calibrate += ["--out", str(folder / "profile.yaml")]
    done = subprocess.run(calibrate, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    engine = yaml.safe_load((folder / "profile.yaml").read_text())["engine"]
    return {
        "requests": data["num_prompts"],
        "completed": data["completed"],
        "calibrate read": done.stdout.splitlines()[0],
        "c0 by calibrate, relative error": round(engine["latency"][0] / latency[0] - 1, 4),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("live.unknown", __doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--servers", type=count, default=4, help="default: %(default)s; 0.9 GB each")
    parser.add_argument("--scale", type=rate, default=1.0, help="factor of what servers sleep (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    arguments = parser.read(argv)
    parts, rows = arguments.parts or PARTS, Row()
    latencies = [[arguments.scale * each for each in PROFILES[n % 2]] for n in range(arguments.servers)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with vllm_servers(latencies, [BLOCKS] * arguments.servers, 8192, 1.0, folder) as addresses:
            for part in parts:
                if part == "auto":
                    run = run_auto(folder, addresses, latencies)
                else:
                    run = run_client(folder, addresses[0], latencies[0])
                rows[part] = uvloop.run(run) | {"load": round(os.getloadavg()[0], 1)}
                print(part, json.dumps(rows[part]), flush=True)
    if arguments.json:
        write_text(arguments.json, json.dumps({"machine": machine(argv, "live.unknown"), **rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
