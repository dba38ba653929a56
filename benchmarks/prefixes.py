"""Environments whose prompts share prefixes: QoS of rules that see prefix caches and of rules that do not, and speed.

python -m benchmarks.prefixes qos [ENVIRONMENT ...]    # 8 episodes of 1,500 requests; two rules are tuned
python -m benchmarks.prefixes speed [ENVIRONMENT ...]  # decisions/s on one device, with less and less simulated
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np

import jaxroute
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.statistics import mean_interval, paired_difference
from jaxroute.evaluation.tuning import tune_routers
from jaxroute.routers import make_router

ENVIRONMENTS = ("chat-3", "documents-3", "agents-3")
LOAD_ONLY = ("round_robin", "shortest_queue", "least_work", "llm_d", "vllm_data_parallel")
PREFIX_AWARE = ("llm_d_prefix", "dynamo_kv", "sglang_cache_aware")
TUNED = ("index_rule+admission", "index_rule_prefix+admission")
EPISODES, LENGTH, DECISIONS, SEED = 8, 1500, 100_000, 7
BATCH, STEPS = 64, 200


def qos(name: str) -> None:
    env, params = jaxroute.make(name, episode_length=LENGTH)
    tuned = tune_routers(env, params, TUNED, decisions=DECISIONS)
    routers = {router: make_router(router, env) for router in LOAD_ONLY + PREFIX_AWARE}
    routers |= {router: make_router(router, env, **tuned[router].parameters) for router in TUNED}
    results = evaluate_routers(env, params, routers, EPISODES, SEED)
    best = max(LOAD_ONLY, key=lambda router: results[router]["qos"].mean())
    for router, values in results.items():
        mean, lead = mean_interval(values["qos"]), paired_difference(values["qos"], results[best]["qos"])
        used, dropped, preempted = (float(values[key].mean()) for key in ("kv_use", "drop_rate", "preemptions"))
        print(
            f"{name}, {router}: QoS {mean.mean:.3f} +- {mean.half_width:.3f}, {lead.mean:+.3f} +- "
            f"{lead.half_width:.3f} to {best}; TTFT {values['ttft'].mean():.2f} s, {preempted:.0f} preemptions, "
            f"{100 * used:.0f} % of KV caches used, {100 * dropped:.0f} % dropped",
            flush=True,
        )


def speed(name: str) -> None:
    env, params = jaxroute.make(name, penalty="off", metrics="off")
    engines = params.engines
    kinds = {
        "shared prefixes": engines,
        "only own blocks": engines.replace(prefix_pieces=0),
        "no prefix caching": engines.replace(prefix_pieces=0, enable_prefix_caching=False),
        "and no asynchronous scheduling": engines.replace(
            prefix_pieces=0, enable_prefix_caching=False, async_scheduling=False
        ),
    }
    for kind, own in kinds.items():
        rate, seconds, size = _rate(env, params.replace(engines=own), 0 if name == "documents-3" else 1)
        print(f"{name}, {kind}: {rate:,.0f} decisions/s, compiled in {seconds:.0f} s, {size:,} B of state", flush=True)


def _rate(env: RoutingEnvironment, params: EnvParams, piece: int) -> tuple[float, float, int]:
    """Decisions per CPU second, CPU seconds of the compilation, bytes of an environment's state.

    The requests with one owner of this piece go to one expert, and the caches are full when the clock starts.
    """

    def run(state: Any, key: jax.Array) -> Any:
        def step(state: Any, key: jax.Array) -> tuple[Any, None]:
            actions = state.request.prefix.owner[:, piece] % env.num_experts
            return jax.vmap(env.step, (0, 0, 0, None))(jax.random.split(key, BATCH), state, actions, params)[1], None

        return jax.lax.scan(step, state, jax.random.split(key, STEPS))[0]

    reset = jax.jit(lambda key: jax.vmap(env.reset, (0, None))(jax.random.split(key, BATCH), params)[1])
    state = reset(jax.random.key(0))
    start = time.process_time()
    program = jax.jit(run).lower(state, jax.random.key(1)).compile()
    compilation = time.process_time() - start
    rates = []
    for index in range(8):
        start = time.process_time()
        state = jax.block_until_ready(program(state, jax.random.key(index)))
        rates.append(BATCH * STEPS / (time.process_time() - start))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // BATCH
    return float(np.median(rates[3:])), compilation, size


if __name__ == "__main__":
    what, names = sys.argv[1], sys.argv[2:] or ENVIRONMENTS
    for one in names:
        {"qos": qos, "speed": speed}[what](one)
