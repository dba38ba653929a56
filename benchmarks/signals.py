"""Old signals: QoS over the age that a router's view of the engines may have, trained on new and on equally old ones.

python -m benchmarks.signals [ENVIRONMENT ...]  # by default overload-3 and rtx4090-3

It prints a table and draws benchmarks/pictures/signals.png.

The learned policies are the linear starts of trainings, without what follows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import jaxroute
from jaxroute.agent.start import linear_start
from jaxroute.drawing import STYLE
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.statistics import mean_interval
from jaxroute.evaluation.tuning import tune_routers
from jaxroute.files import whole_file
from jaxroute.routers import make_router
from jaxroute.routers.choice import Router
from jaxroute.routers.linear import linear_policy
from jaxroute.runs.devices import use_all_cores

DELAYS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
RULE, DECISIONS = "index_rule+admission", 800_000
EPISODES, LENGTH, SEED = 8, 1500, 13
LINES = {
    "linear policy, trained on signals as old": "#0b6e8a",
    "linear policy, trained on new signals": "#7fb8c9",
    "index rule, tuned on signals as old": "#c2571a",
    "index rule, tuned on new signals": "#e0a98a",
    "Shortest Queue First": "#9aa5ad",
}


def curves(name: str) -> dict[str, list[float]]:
    """QoS of each line at each of `DELAYS`."""
    env, params = jaxroute.make(name, episode_length=LENGTH)
    found: dict[str, list[float]] = {label: [] for label in LINES}
    new: list[Router] = []
    for delay in DELAYS:
        old = params.replace(signal_delay=jnp.asarray(delay, float))
        weights = jnp.asarray(linear_start(env, old, None, DECISIONS, 0))
        tuned = tune_routers(env, old, [RULE], decisions=DECISIONS)[RULE]
        own = [jax.tree_util.Partial(linear_policy, weights), make_router(RULE, env, **tuned.parameters)]
        new = new or own
        routers = dict(zip(LINES, [own[0], new[0], own[1], new[1], make_router("shortest_queue", env)], strict=True))
        values = evaluate_routers(env, old, routers, EPISODES, SEED)
        means = {label: mean_interval(one["qos"]) for label, one in values.items()}
        for label, mean in means.items():
            found[label].append(float(mean.mean))
        cells = " | ".join(f"{mean.mean:.4f} ± {mean.half_width:.4f}" for mean in means.values())
        print(f"| `{name}` | {delay:g} | {cells} |", flush=True)
    return found


def picture(path: Path, found: dict[str, dict[str, list[float]]]) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(found), 3.8), layout="constrained")
        plots = np.atleast_1d(figure.subplots(1, len(found)))
        for axes, (name, lines) in zip(plots, found.items(), strict=True):
            for label, values in lines.items():
                axes.plot(DELAYS, values, marker="o", color=LINES[label], label=label)
            axes.set(title=name, xlabel="signals are at most this old, s", ylabel="QoS per request", ylim=(0, None))
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    use_all_cores()
    names = sys.argv[1:] or ["overload-3", "rtx4090-3"]
    print(f"| environment | delay, s | {' | '.join(LINES)} |\n|{'---|' * (len(LINES) + 2)}")
    picture(Path(__file__).parent / "pictures" / "signals.png", {name: curves(name) for name in names})
