"""The universal router: its weights from a training, its lead over a tuned rule on random clusters, and the suite.

python -m benchmarks.universal weights RUN         # RUN of configs/universal.yaml into jaxroute/routers/universal.json
python -m benchmarks.universal clusters [COUNT]    # held-out clusters, by default 200; goes on where it was stopped
python -m benchmarks.universal suite [RESULTS]     # QoS in each environment of the suite, beside a results.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import jaxroute
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_saved_config
from jaxroute.drawing import STYLE
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.environment.observation import RELATIVE_FEATURES
from jaxroute.environment.random_clusters import HELD_OUT, random_cluster
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.statistics import paired_difference
from jaxroute.evaluation.tuning import tune_routers
from jaxroute.files import whole_file, write_text
from jaxroute.routers import make_router
from jaxroute.routers.linear import UNIVERSAL
from jaxroute.runs.checkpoint import load_params
from jaxroute.runs.devices import use_all_cores

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "universal.json", HERE / "pictures" / "universal.png"
RULE, DECISIONS = "index_rule+admission", 200_000
EXPERTS, EPISODES, LENGTH, TUNING_LENGTH, SEED = 6, 4, 1500, 1000, 11


def weights(run: Path) -> None:
    """Writes the linear part of the policy of `run`, which is all of a start that nothing was added to."""
    experiment = build_experiment(load_saved_config(run / "config.yaml"))
    if experiment.env.features != "relative":
        sys.exit(f"error: {run}: its features are not the relative ones; train with configs/universal.yaml")
    params = load_params(run, experiment.network, experiment.env, experiment.params)
    linear = params["params"]["actor"]["linear"]
    values = [*np.asarray(linear["weight"])[0].tolist(), *np.asarray(linear["drop"]).tolist()]
    names = dict(zip((*RELATIVE_FEATURES, "drop"), (float(f"{value:.5g}") for value in values), strict=True))
    content = {"dynamics_version": DYNAMICS_VERSION, "license": "Apache-2.0", "weights": names}
    write_text(UNIVERSAL, json.dumps(content, indent=2) + "\n")


def clusters(count: int) -> None:
    """The universal router, the rule tuned to each cluster, and Shortest Queue First on the first held-out clusters."""
    env, _ = jaxroute.make("random-cluster", num_experts=EXPERTS, queue_nodes=1)
    env, search = (replace(env, episode_length=length) for length in (LENGTH, TUNING_LENGTH))
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for number in range(HELD_OUT, HELD_OUT + count):
        if str(number) in found:
            continue
        params = random_cluster(number, EXPERTS, env.slots, LENGTH)
        of_search = random_cluster(number, EXPERTS, env.slots, TUNING_LENGTH)  # with its changes
        tuned = tune_routers(search, of_search, [RULE], decisions=DECISIONS, keep=False)[RULE]
        routers = {"universal": make_router("universal", env), RULE: make_router(RULE, env, **tuned.parameters)}
        routers["shortest_queue"] = make_router("shortest_queue", env)
        values = evaluate_routers(env, params, routers, EPISODES, SEED)
        found[str(number)] = {name: np.round(one["qos"].astype(float), 5).tolist() for name, one in values.items()}
        write_text(RESULTS, json.dumps(found, indent=1) + "\n")
        lead = paired_difference(values["universal"]["qos"], values[RULE]["qos"])
        print(f"cluster {number}: {values['universal']['qos'].mean():.4f}, {lead.mean:+.4f} +- {lead.half_width:.4f}")
    _picture(found)


def _picture(found: dict[str, Any]) -> None:
    qos = {name: np.array([np.mean(one[name]) for one in found.values()]) for name in ("universal", RULE)}
    lead = 100 * (qos["universal"] / np.maximum(qos[RULE], 1e-9) - 1)
    order = np.sort(lead)
    low, middle, high = np.percentile(lead, [10, 50, 90])
    means = f"mean QoS {qos['universal'].mean():.4f} and {qos[RULE].mean():.4f}"
    spread = f"median {middle:+.1f}, {low:+.1f} to {high:+.1f} in 80 of 100"
    print(f"{len(lead)} clusters: {means}; lead in % of the rule's: {spread}; below -5 %: {(lead < -5).sum()}")
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            100 * (np.arange(len(order)) + 0.5) / len(order), np.clip(order, -50, 50), color="#0b6e8a", marker="."
        )
        axes.axhline(0, color="#9aa5ad", linewidth=1)
        axes.set(
            xlabel="held-out clusters, % of them",
            ylabel="lead over the rule tuned there, %",
            title=f"Universal router on {len(order)} random clusters (cut at 50 %)",
        )
        with whole_file(PICTURE) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def suite(results: Path | None) -> None:
    """QoS on the suite's evaluation episodes, and the lead over the columns in the file of results."""
    chosen = jaxroute.suite("routing-v1")
    columns = json.loads(results.read_text())["columns"] if results else {}
    for name in chosen.environments:
        column = chosen.evaluate(lambda env, _: make_router("universal", env), [name], ["evaluation"])
        own = np.array(column[name]["evaluation"][0])
        leads = []
        for other, by_environment in columns.items():
            runs = by_environment.get(name, {}).get("evaluation")
            if runs:
                lead = paired_difference(own, np.mean(runs, axis=0))
                leads.append(f"{other} {np.mean(runs):.4f} ({lead.mean:+.4f} +- {lead.half_width:.4f})")
        print(f"{name}: universal {own.mean():.4f}; {'; '.join(leads)}", flush=True)


if __name__ == "__main__":
    use_all_cores()
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "weights":
        weights(Path(rest[0]))
    elif what == "clusters":
        clusters(int(rest[0]) if rest else 200)
    else:
        suite(Path(rest[0]) if rest else None)
