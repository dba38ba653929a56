"""Real vLLM servers whose executor sleeps instead of running a model, as processes of an environment of their own.

The scripts that make the environment and start the servers are not in the repository: LIVE_TOOLS names their folder,
LIVE the folder with the environment (`v33`) and the model (`tiny`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxroute.errors import UserError

START_SECONDS = 600


def folders() -> tuple[Path, Path]:
    """The tools, and the environment with the model. Raises `UserError`."""
    tools, live = (
        Path(os.environ.get(name, default))
        for name, default in (("LIVE_TOOLS", "../shared/live"), ("LIVE", "build/live"))
    )
    if not (tools / "start_sleep.sh").is_file():
        raise UserError(f"{tools}: has no start_sleep.sh; name the folder of the tools with LIVE_TOOLS")
    if not (live / "v33" / "bin" / "python").exists() or not (live / "tiny").is_dir():
        raise UserError(f"{live}: has no environment v33 and model tiny; make live makes them, 3 GB")
    return tools.resolve(), live.resolve()


@contextmanager
def vllm_servers(
    latencies: Sequence[Sequence[float]],
    blocks: Sequence[int],
    max_model_len: int,
    scale: float,
    logs: Path,
    first_port: int = 8101,
) -> Generator[list[str]]:
    """The addresses of a server for each latency model and number of KV blocks

    Token e of a prompt says how long the answer of server e is.
    """
    tools, live = folders()
    processes: list[subprocess.Popen[bytes]] = []
    addresses = [f"http://127.0.0.1:{first_port + number}" for number in range(len(latencies))]
    try:
        for number, (latency, usable) in enumerate(zip(latencies, blocks, strict=True)):
            env = {
                **os.environ,
                "LIVE": str(live),
                "HERE": str(tools),
                "PY": str(live / "v33" / "bin" / "python"),
                "INDEX": str(number),
                "VLLM_TARGET_DEVICE": "cpu",
            }
            env.pop("PYTHONPATH", None)
            port = str(first_port + number)
            command = ["bash", str(tools / "start_sleep.sh"), port, json.dumps(list(latency)), str(usable), str(scale)]
            command += ["--max-model-len", str(max_model_len)]  # vLLM wants blocks for a request of this length
            with (logs / f"server_{port}.log").open("wb") as file:
                processes.append(subprocess.Popen(command, env=env, cwd=live, stdout=file, stderr=file))
        deadline = time.monotonic() + START_SECONDS
        for address, process in zip(addresses, processes, strict=True):
            while not _is_up(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log = logs / f"server_{address.rsplit(':', 1)[1]}.log"
                    last = log.read_text(errors="replace").splitlines()[-1:]
                    raise UserError(f"the server at {address} did not start: {' '.join(last)[:300]}")
                time.sleep(1)
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
