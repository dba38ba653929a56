"""Environments whose prompts share prefixes: QoS of rules that see prefix caches and of rules that do not, and speed.

python -m benchmarks.prefixes qos [ENVIRONMENT ...]    # 8 episodes of 1,500 requests; two rules are tuned
python -m benchmarks.prefixes speed [ENVIRONMENT ...]  # decisions/s on one device, with less and less simulated
python -m benchmarks.prefixes unique [ENVIRONMENT ...] # what both options cost where prompts share nothing
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
UNIQUE = ("paper-3", "rtx4090-3", "memory-3")
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
        # The requests with one owner of this piece go to one expert, and the caches are full when the clock starts.
        run = _Program(env, params.replace(engines=own), 0 if name == "documents-3" else 1)
        rate = np.median([run.decisions_per_second(index) for index in range(8)][3:])
        print(
            f"{name}, {kind}: {rate:,.0f} decisions/s, compiled in {run.compilation:.0f} s, "
            f"{run.state_bytes:,} B of state",
            flush=True,
        )


def unique(name: str) -> None:
    """Of steps as they are by default. The programs run in turn, so that other work slows all of them down alike."""
    kinds = {"both off": None, "both on": "vllm-0.33"}
    runs = {kind: _Program(*jaxroute.make(name, engine=own), None) for kind, own in kinds.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(12):
        for kind, run in runs.items():
            rates[kind].append(run.decisions_per_second(index))
    off, on = (float(np.median(values[3:])) for values in rates.values())
    sizes = [run.state_bytes for run in runs.values()]
    print(
        f"{name}: {off:,.0f} decisions/s with both off, {on:,.0f} with both on, {off / on:.2f} times the cost; "
        f"{sizes[0]:,} and {sizes[1]:,} B of state",
        flush=True,
    )


class _Program:
    """Steps of a batch of environments under a fixed rule, compiled."""

    def __init__(self, env: RoutingEnvironment, params: EnvParams, piece: int | None):
        def run(state: Any, key: jax.Array) -> Any:
            def step(state: Any, key: jax.Array) -> tuple[Any, None]:
                at = state.step if piece is None else state.request.prefix.owner[:, piece]
                keys = jax.random.split(key, BATCH)
                return jax.vmap(env.step, (0, 0, 0, None))(keys, state, at % env.num_experts, params)[1], None

            return jax.lax.scan(step, state, jax.random.split(key, STEPS))[0]

        reset = jax.jit(lambda key: jax.vmap(env.reset, (0, None))(jax.random.split(key, BATCH), params)[1])
        self._state = reset(jax.random.key(0))
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)) // BATCH
        start = time.process_time()
        self._run = jax.jit(run).lower(self._state, jax.random.key(1)).compile()
        self.compilation = time.process_time() - start

    def decisions_per_second(self, index: int) -> float:
        """Of a CPU second, in `STEPS` further steps."""
        start = time.process_time()
        self._state = jax.block_until_ready(self._run(self._state, jax.random.key(index)))
        return BATCH * STEPS / (time.process_time() - start)


if __name__ == "__main__":
    what = sys.argv[1]
    for one in sys.argv[2:] or (UNIQUE if what == "unique" else ENVIRONMENTS):
        {"qos": qos, "speed": speed, "unique": unique}[what](one)
