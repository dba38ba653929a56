"""Short episodes in which everything happens, whose numbers are on record in data/dynamics.npz.

    python -m tests.record_dynamics    # records them anew, for a new DYNAMICS_VERSION

The cases cover every discipline, both kinds of observations, each form of the penalty, disturbances, bursts and shared
prefixes. Each is one program over two clusters, with more slots than the step works on while queues are short.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from tests.rollouts import CHEAP_COMPILE

RECORD = Path(__file__).parent / "data" / "dynamics.npz"
EPISODE, STEPS = 40, 44
ACTIONS = (0, 0, 1, 0, 2, 0, 0, 1, 0, 3, 0, 1, 0, 0, 2)
"""In turn; 3 drops. Most requests go to expert 0, which becomes full."""


class Case(NamedTuple):
    """Clusters that share a program: what `jaxroute.make` takes for all of them, and what each is."""

    options: dict[str, Any]
    clusters: tuple[Cluster, ...]


class Cluster(NamedTuple):
    name: str  # of the registered environment
    seed: int  # of its randomness, and of where in ACTIONS it begins
    kv_cache_tokens: tuple[int, ...]
    params: dict[str, float]  # in place of its own
    rate: float | None = None  # of arrivals, in place of its own
    workload: str | None = None  # the registered environment whose workload it has in place of its own


CASES = {
    "vllm_v1": Case(
        {"obs": "graph", "penalty": "predicted", "metrics": "exact"},
        (
            Cluster("paper-3", 2, (300, 320, 600), {"latency_limit": 0.04}, rate=20.0),
            Cluster("rtx4090-3", 22, (300, 320, 600), {}, rate=40.0),
        ),
    ),
    "vllm_v0": Case(
        {"obs": "flat", "penalty": "exact", "metrics": "histogram", "discipline": "vllm_v0", "max_model_len": 256},
        (
            Cluster("slowdown-3", 9, (360, 400, 600), {"credit_discount": 0.9, "latency_limit": 0.06}, rate=12.0),
            Cluster("failure-3", 11, (300, 320, 600), {"credit_discount": 0.9}, rate=6.0),
        ),
    ),
    "orca": Case(
        {"obs": "graph", "penalty": "paper", "metrics": "exact", "discipline": "orca", "max_model_len": 180},
        (
            Cluster("quality-3", 22, (400, 400, 800), {"penalty_weight": 0.5}, workload="bursts-3"),
            Cluster("quality-3", 3, (400, 400, 800), {"latency_limit": 0.06}, workload="bursts-3"),
        ),
    ),
    "prefixes": Case(
        {"obs": "graph", "penalty": "predicted", "metrics": "exact"},
        (
            Cluster("chat-3", 14, (2600, 2600, 640), {"latency_limit": 0.035}, rate=14.0),
            Cluster("chat-3", 12, (2600, 2600, 640), {"latency_limit": 0.035}, rate=18.0),
        ),
    ),
}


def rollout(case: Case) -> tuple[Any, ...]:
    """(observation, state, reward, done, info) of `STEPS` steps in the view of five values; leaves [STEPS, clusters,
    ...] of NumPy arrays."""
    options = {"slots": 18, "queue_nodes": 2, "episode_length": EPISODE, **case.options}
    made = [jaxroute.make(own.name, kv_cache_tokens=own.kv_cache_tokens, **options) for own in case.clusters]
    env = jaxroute.FiveValues(made[0][0])
    clusters = [_changed(params, own) for (_, params), own in zip(made, case.clusters, strict=True)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clusters)
    seeds = jnp.asarray([own.seed for own in case.clusters])

    def run(params: Any) -> Any:
        keys = jax.vmap(jax.random.key)(seeds)
        fold_in = jax.vmap(jax.random.fold_in, (0, None))

        def step(state: Any, index: jax.Array) -> tuple[Any, Any]:
            actions = jnp.asarray(ACTIONS, jnp.int32)[(index + seeds) % len(ACTIONS)]
            values = jax.vmap(env.step)(fold_in(keys, index), state, actions, params)
            return values[1], values

        _, state = jax.vmap(env.reset)(fold_in(keys, STEPS), params)
        return jax.lax.scan(step, state, jnp.arange(STEPS, dtype=jnp.int32))[1]

    return jax.device_get(jax.jit(run, compiler_options=CHEAP_COMPILE)(params))


def _changed(params: Any, cluster: Cluster) -> Any:
    if cluster.workload is not None:
        params = params.replace(workload=jaxroute.make(cluster.workload)[1].workload)
    if cluster.rate is not None:
        arrivals = params.workload.arrivals.replace(rate=jnp.asarray(cluster.rate, float))
        params = params.replace(workload=params.workload.replace(arrivals=arrivals))
    return params.replace(**{name: jnp.asarray(value, float) for name, value in cluster.params.items()})


def recorded(run: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """What is on record of a rollout, by name: every number that a user sees, and clocks and counters of the state."""
    observation, state, reward, done, info = run
    totals = info["episode"]
    tree = {
        "observation": observation,
        "reward": reward,
        "done": done,
        "info": {name: info[name] for name in ("qos", "penalty", "elapsed")},
        "episode": totals.replace(timing_record=None),
        "engines": {name: getattr(state.engines, name) for name in ("clock", "num_requests", "num_running")},
        "state": {name: getattr(state, name) for name in ("request", "step", "recent_gap", "recent_latency")},
        "at the end": jax.tree.map(
            lambda leaf: leaf[EPISODE - 1], {"observation": info["final_observation"], "timings": totals.timing_record}
        ),
    }
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def main() -> None:
    arrays = {f"{name}/{key}": array for name, case in CASES.items() for key, array in recorded(rollout(case)).items()}
    np.savez_compressed(RECORD, **arrays)
    print(f"{len(arrays)} arrays in {RECORD}, {RECORD.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
