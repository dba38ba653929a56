"""How far the engines of environments with prefixes are from vLLM's block-level rules, and how often content is copied.

    python -m tests.prefix_fidelity [EPISODES] [LENGTH] [RANGES]

RANGES are the engines' `prefix_runs`; the default is the environments' own. Each environment runs with random actions
and with actions by conversation or document, in float64; the plain Python cluster (`tests.reference.cluster`) runs on
the same requests and actions.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np

import jaxroute
from tests.rollouts import batch_of_runs, oracle

ENVIRONMENTS = ("chat-3", "documents-3", "agents-3")


def main() -> None:
    given = [int(number) for number in sys.argv[1:]]
    episodes, length, ranges = [*given, *(4, 1000, 0)[len(given) :]]
    jax.config.update("jax_enable_x64", True)
    for name in ENVIRONMENTS:
        env, params = jaxroute.make(name, episode_length=length, metrics="exact", penalty="off")
        if ranges:
            params = params.replace(engines=params.engines.replace(prefix_runs=ranges))
        rng = np.random.default_rng(0)
        anyone = [rng.integers(0, 3, length) for _ in range(episodes)]
        runs = batch_of_runs(dataclasses.replace(env, metrics="exact"), [params] * episodes, anyone, seed=0)
        # Requests do not depend on actions.
        piece = 0 if name == "documents-3" else 1
        sticky = [run.before.request.prefix.owner[:, piece] % 3 for run in runs]
        for how, actions in (("any server", anyone), ("always the same", sticky)):
            if how != "any server":
                runs = batch_of_runs(env, [params] * episodes, actions, seed=0)
            copies = differ = served = 0
            errors, means = [], []
            for run, own in zip(runs, actions, strict=True):
                cluster, _ = oracle(env, params, run, range(length), own, run.info["elapsed"])
                cluster.drain()
                copies += sum(expert.engine.pool.copies for expert in cluster.experts)
                timings = run.info["episode"].timing_record[-1]
                for index, fate in enumerate(cluster.fates):
                    if fate.status == "completed":
                        served += 1
                        differ += abs(timings[0, index] - fate.latency_per_token) > 1e-9
                        errors.append(abs(timings[0, index] / fate.latency_per_token - 1))
                means.append(np.nanmean(timings[0]) / np.mean([f.latency_per_token for f in cluster.fates if f.served]))
            print(
                f"{name}, {how}: {served} requests, {copies} copied blocks, {100 * differ / served:.2f} % of latencies "
                f"differ, by {100 * np.nanmean(errors):.3f} % on average and {100 * np.nanmax(errors):.1f} % at most; "
                f"their mean by {100 * np.max(np.abs(np.subtract(means, 1))):.3f} % at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
