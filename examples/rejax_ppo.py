"""rejax's PPO, unchanged, on `paper-3`, compared with Round-Robin on the same held-out episodes.

    pip install 'jaxroute[rejax]'
    python examples/rejax_ppo.py            # QoS .708 after 1,048,576 steps, .701 after half; Round-Robin .593
    python examples/rejax_ppo.py --short    # under a minute, most of it compilation; learns nothing

rejax 0.1 expects five values from a step, whichever gymnax is installed, so this uses `five_values=True`. Its
`eval_callback` returns the agents during training, and they are compared after training. The scenario has 3 requests/s.
Training episodes have 250 requests, those of the comparison 1,000. On a busy two-core CPU, training took 2 min 26 s and
77 s of CPU time (rejax 0.1.3, gymnax 1.0.1, JAX 0.10.2, seed 0). Its picture is docs/pictures/rejax.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import rejax

import jaxroute
from jaxroute.adapters import to_gymnax

OWN = {
    "ent_coef": 0.003,
    "num_epochs": 4,
    "num_minibatches": 8,
    "max_grad_norm": 0.5,
    "normalize_observations": True,
}
LONG = {"num_envs": 64, "num_steps": 64, "total_timesteps": 1_048_576, "eval_freq": 131_072}
SHORT = {"num_envs": 8, "num_steps": 16, "total_timesteps": 256, "eval_freq": 128}


def environment(short: bool) -> tuple[Any, Any]:
    """The scenario with flat observations, and without totals of episodes, which agents do not use."""
    options: dict[str, Any] = {"slots": 8, "queue_nodes": 2} if short else {}
    return jaxroute.make("paper-3", obs="flat", metrics="off", episode_length=250, **options)


def snapshot(algorithm: Any, state: Any, rng: jax.Array) -> Any:
    """What an agent needs to act, for rejax's `eval_callback`."""
    return state.actor_ts.params, state.obs_rms_state


def compare(env: Any, params: Any, algorithm: Any, state: Any, snapshots: Any, short: bool) -> dict[Any, float]:
    """QoS per request over whole fresh episodes, of heuristics by name and of agents by their training steps.

    `state` is the last state of training. The first axis of `snapshots` has the agents during training.
    """
    env = replace(env, episode_length=50 if short else 1000)

    def route(agent: Any, key: jax.Array, observation: Any, env_state: Any, params: Any) -> jax.Array:
        actor, statistics = agent
        trained = state.replace(actor_ts=state.actor_ts.replace(params=actor), obs_rms_state=statistics)
        return algorithm.make_act(trained)(observation, key)

    agents = {}
    for steps in range(algorithm.eval_freq, algorithm.total_timesteps + 1, algorithm.eval_freq):
        agent = jax.tree.map(lambda leaf: leaf[len(agents)], snapshots)
        agents[steps] = jax.tree_util.Partial(route, agent)
    heuristics = {name: jaxroute.make_router(name, env) for name in ("round_robin", "shortest_queue")}
    values = jaxroute.evaluate_routers(env, params, heuristics | agents, episodes=2 if short else 16, seed=1)
    return {name: float(metrics["qos"].mean()) for name, metrics in values.items()}


def report(algorithm: str, qos: dict[Any, float], picture: Path | None) -> None:
    """Prints the comparison, and draws the agent's learning curve with the heuristics."""
    curve = {name: value for name, value in qos.items() if isinstance(name, int)}
    for name, value in qos.items():
        print(f"{f'{algorithm} after {name:,} steps' if name in curve else name:32} QoS per request {value:.4f}")
    if picture is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([steps / 1000 for steps in curve], list(curve.values()), marker="o", label=algorithm)
    for name, label, style in (("round_robin", "Round-Robin", "--"), ("shortest_queue", "Shortest Queue First", ":")):
        axes.axhline(qos[name], color="grey", linestyle=style, label=label)
    axes.set(
        title=f"{algorithm} on paper-3", xlabel="training steps, thousands", ylabel="QoS per request", xlim=(0, None)
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(picture, dpi=150)


def run(name: str, algorithm: Any, description: str | None, long: dict[str, Any], short: dict[str, Any]) -> None:
    """Trains an algorithm of rejax with the options of the command line, then compares and draws it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps on a small cluster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to draw the learning curve, a PNG file")
    options = parser.parse_args()

    env, params = environment(options.short)
    gymnax_env, gymnax_params = to_gymnax(env, params, five_values=True)
    agent = algorithm.create(
        env=gymnax_env,
        env_params=gymnax_params,
        gamma=0.97,
        learning_rate=5e-4,
        skip_initial_evaluation=True,
        **(short if options.short else long),
    ).replace(eval_callback=snapshot)
    state, snapshots = jax.jit(agent.train)(jax.random.PRNGKey(options.seed))
    report(name, compare(env, params, agent, state, snapshots, options.short), options.picture)


if __name__ == "__main__":
    run("PPO of rejax", rejax.PPO, __doc__, OWN | LONG, OWN | SHORT)
