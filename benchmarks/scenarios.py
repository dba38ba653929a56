"""Speed where it is real: the environment's step, and a comparison of five routers, in registered environments.

python -m benchmarks.scenarios step [ENVIRONMENT ... | CONFIG.yaml key=value ...]  # decisions/s, Shortest Queue First
python -m benchmarks.scenarios evaluation [ENVIRONMENT ...]  # seconds for 20 episodes of 5,000 requests
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.routers import make_router
from jaxroute.runs.devices import use_all_cores

ENVIRONMENTS = ("paper-3", "measured-3", "rtx4090-3", "a100-3", "mixed-3", "memory-3")
ROUTERS = ("index_rule+admission", "shortest_queue", "round_robin", "bert_router", "random")
BATCH, STEPS, CALLS = 256, 150, 7


def step(name: str, env: RoutingEnvironment, params: EnvParams) -> None:
    """As in training: requests, simulator, observation, penalty, metrics and resets of `BATCH` environments."""

    def run(state: Any, key: jax.Array) -> Any:
        def one(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            action = jax.vmap(env.queue_lengths)(state).argmin(1).astype(jnp.int32)
            out = jax.vmap(env.step, (0, 0, 0, None))(jax.random.split(key, BATCH), state, action, params)
            return out[1], jax.tree.reduce(lambda total, leaf: total + leaf.sum(), (out[0], out[2]), jnp.zeros(()))

        return jax.lax.scan(one, state, jax.random.split(key, STEPS))

    state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), BATCH), params)[1]
    start = time.perf_counter()
    program = jax.jit(run).lower(state, jax.random.key(0)).compile()
    compiled, seconds = time.perf_counter() - start, []
    for call in range(3 + CALLS):  # queues have about their steady length after the first three
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, jax.random.key(call)))
        seconds.append(time.perf_counter() - start)
    rates = sorted(BATCH * STEPS / np.array(seconds[3:]))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // BATCH
    shown = f"{rates[0]:,.0f} | {rates[CALLS // 2]:,.0f} | {rates[-1]:,.0f}"
    print(f"| `{name}` | {shown} | {compiled:.1f} | {size:,} |", flush=True)


def evaluation(name: str) -> None:
    env, params = jaxroute.make(name)
    routers = {router: make_router(router, env) for router in ROUTERS}
    compare = partial(evaluate_routers, env, params, routers, 20)
    compare(0)
    start = time.perf_counter()
    compare(1)
    print(f"{name}: {time.perf_counter() - start:.1f} s for five routers", flush=True)


def chosen(arguments: list[str]) -> list[tuple[str, RoutingEnvironment, EnvParams]]:
    """Registered environments, or that of one configuration."""
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        experiment = build_experiment(load_config(Path(arguments[0]), arguments[1:]))
        return [(Path(arguments[0]).stem, experiment.env, experiment.params)]
    return [(name, *jaxroute.make(name)) for name in arguments or ENVIRONMENTS]


if __name__ == "__main__":
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "step":
        print("| environment | slowest | median | fastest | compile, s | state, B |\n|---|---|---|---|---|---|")
        for one in chosen(rest):
            step(*one)
    else:
        use_all_cores()
        for one in rest or ENVIRONMENTS[:3]:
            evaluation(one)
