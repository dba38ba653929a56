"""Decisions a second: the whole environment step (simulator, observation, predicted penalty, metrics, auto-reset) under
Shortest Queue First, and the same with the router's network choosing.

    python benchmarks/environment.py [--environment paper-6] [--rate 6] [--num-envs 64 256 1024] [--json OUT.json]

Parameters are traced, as in training. Each call runs `--steps` steps, which is one episode, so that its end with drain
and reset is part of it, and ends in `block_until_ready`. Reported: the slowest, median and fastest of `--repeats` calls
after one to warm up, compile time apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxroute
from jaxroute.learner.sac import policy_logits
from jaxroute.network.router_network import RouterNetwork

COLUMNS = ("router", "num_envs", "slowest", "median", "fastest", "compile_seconds", "state_bytes", "qos")


def measure(
    environment: str, rate: float, num_envs: int, steps: int, repeats: int, slots: int, with_network: bool
) -> dict[str, Any]:
    """Rates (decisions/s), compile time (s), bytes of state per environment and QoS per request at one batch size."""
    env, params = jaxroute.make(environment, slots=slots, episode_length=steps)
    arrivals = params.workload.arrivals.replace(rate=jnp.asarray(rate, float))
    params = params.replace(workload=params.workload.replace(arrivals=arrivals))
    observation, state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), num_envs), params)
    network = RouterNetwork()
    weights = jax.jit(network.init)(jax.random.key(1), observation)

    def act(observation: Any, state: Any, weights: Any) -> jax.Array:
        if with_network:
            return jnp.argmax(policy_logits(network, weights, observation), axis=-1)
        return jnp.argmin(state.engines.num_requests, axis=-1)

    def run(carry: Any, key: jax.Array, params: Any, weights: Any) -> tuple[Any, Any]:
        def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            observation, state = carry
            actions = act(observation, state, weights)
            keys = jax.random.split(key, num_envs)
            observation, state, reward, _, _, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, actions, params)
            return (observation, state), (reward.mean(), info["qos"].mean())

        return jax.lax.scan(step, carry, jax.random.split(key, steps))

    carry = (observation, state)
    start = time.perf_counter()
    program = jax.jit(run, donate_argnums=0).lower(carry, jax.random.key(0), params, weights).compile()
    compile_seconds = time.perf_counter() - start
    rates, qos = [], 0.0
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        carry, (_, per_decision) = jax.block_until_ready(program(carry, jax.random.key(repeat), params, weights))
        rates.append(num_envs * steps / (time.perf_counter() - start))
        qos = float(per_decision.mean())
    rates = sorted(rates[1:])
    return {
        "router": "network" if with_network else "shortest queue",
        "num_envs": num_envs,
        "slowest": rates[0],
        "median": statistics.median(rates),
        "fastest": rates[-1],
        "compile_seconds": compile_seconds,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // num_envs,
        "qos": qos,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", default="paper-6", help="registered environment (default paper-6)")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (default 6)")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 256, 1024], help="batch sizes")
    parser.add_argument("--steps", type=int, default=200, help="steps of every environment in a call (default 200)")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed (default 5)")
    parser.add_argument("--slots", type=int, default=48, help="slots of every expert (default 48)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    machine = {
        "device": str(jax.devices()[0]),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": date.today().isoformat(),
    }
    title = f"{arguments.environment}, {arguments.rate:g} requests/s, {arguments.slots} slots: decisions/s"
    heads = ("router", "environments", "slowest", "median", "fastest", "compile, s", "state, B", "QoS")
    table = Table(*heads, title=title)
    results = []
    for with_network in (False, True):
        for num_envs in arguments.num_envs:
            result = measure(
                arguments.environment,
                arguments.rate,
                num_envs,
                arguments.steps,
                arguments.repeats,
                arguments.slots,
                with_network,
            )
            results.append(result)
            *numbers, qos = (result[column] for column in COLUMNS[1:])
            table.add_row(result["router"], *(f"{number:,.0f}" for number in numbers), f"{qos:.3f}")
    console = Console(width=100)
    console.print(table, machine)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "setting": title, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
