"""Decisions a second of the whole environment step: simulator, observation, predicted penalty, metrics and auto-reset.

    python benchmarks/environment.py [--environment paper-6] [--rate 6] [--num-envs 64 256 1024] [--json OUT.json]

Actions are those of Shortest Queue First, computed inside the program. Compile time is reported apart; a figure is from
one call of `--steps` steps that ends in `block_until_ready`, the slowest, median and fastest of `--repeats` after one
to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.table
from rich.console import Console

import jaxroute


def measure(environment: str, rate: float, num_envs: int, steps: int, repeats: int, **static: Any) -> dict[str, Any]:
    """Rates (decisions/s) and the compile time (s) of one batch size."""
    env, params = jaxroute.make(environment, **static)
    arrivals = params.workload.arrivals.replace(rate=jnp.asarray(rate, float))  # type: ignore[union-attr]
    params = params.replace(workload=params.workload.replace(arrivals=arrivals))

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        state, _ = carry
        action = jnp.argmin(state.engines.num_requests, axis=1)
        keys = jax.random.split(key, num_envs)
        observation, state, reward, _, _, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
        return (state, observation), (reward.mean(), info["qos"].mean())

    def run(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, jax.random.split(key, steps))

    observation, state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), num_envs), params)
    carry = (state, observation)
    start = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=0).lower(carry, jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - start
    rates, qos = [], 0.0
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        carry, (_, per_decision) = jax.block_until_ready(compiled(carry, jax.random.key(repeat)))
        rates.append(num_envs * steps / (time.perf_counter() - start))
        qos = float(per_decision.mean())
    rates = sorted(rates[1:])
    return {
        "environment": environment,
        "requests_per_second": rate,
        "num_envs": num_envs,
        "slots": env.slots,
        "slowest": rates[0],
        "median": statistics.median(rates),
        "fastest": rates[-1],
        "compile_seconds": compile_seconds,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(carry[0])) // num_envs,
        "qos": qos,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--environment", default="paper-6")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=200, help="steps of every environment in one call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    machine = {
        "device": str(jax.devices()[0]),
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    console = Console()
    columns = ("num_envs", "slowest", "median", "fastest", "compile_seconds", "state_bytes", "qos")
    table = rich.table.Table(
        *columns, title=f"{arguments.environment}, {arguments.rate:g} requests/s, decisions/s, {machine['device']}"
    )
    results = []
    for num_envs in arguments.num_envs:
        result = measure(
            arguments.environment,
            arguments.rate,
            num_envs,
            arguments.steps,
            arguments.repeats,
            slots=arguments.slots,
        )
        results.append(result)
        table.add_row(*(f"{result[c]:,.0f}" if c != "qos" else f"{result[c]:.3f}" for c in columns))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
