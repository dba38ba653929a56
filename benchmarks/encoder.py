"""The graph attention encoder on its two paths, dense arrays and jraph graphs: its time, and frames/s of training.

Every expert has a request a second, as in paper-3. Observations are taken under Shortest Queue First, when queues have
about their steady length. The two paths' calls take turns, so that a machine whose speed changes serves both alike.
Settings are those of configs/default.yaml, changed by key=value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax

from benchmarks.decisions import SETTLED_STEPS, Setting
from benchmarks.environment import shortest_queue
from benchmarks.harness import Column, Parser, Row, count, machine, report, table
from jaxroute.agent.trainer import make_trainer
from jaxroute.config.build import build_experiment, build_network
from jaxroute.config.loader import load_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import RoutingGraph
from jaxroute.errors import command

KINDS = ("han", "han_jraph")  # `network.kind`
QUEUE_NODES = (10, "all")
ENCODER_COLUMNS = (
    Column("experts", "experts"),
    Column("queue_nodes", "queue_nodes", ""),
    Column("batch", "batch"),
    Column("requests", "requests", ".1f"),
    *(Column(f"forward_{kind}", f"{kind}, ms", ",.2f") for kind in KINDS),
    *(Column(f"gradient_{kind}", f"{kind} with gradient, ms", ",.2f") for kind in KINDS),
)
TRAINING_COLUMNS = (
    Column("experts", "experts"),
    Column("queue_nodes", "queue_nodes", ""),
    Column("transition_bytes", "replay, B a transition"),
    *(Column(f"frames_{kind}", f"{kind}, frames/s") for kind in KINDS),
    *(Column(f"compile_{kind}", f"{kind}, compile, s", ".1f") for kind in KINDS),
)


def observations(setting: Setting, queue_nodes: Any) -> RoutingGraph:
    """Of a batch of environments, [num_envs, ...]."""
    env = RoutingEnvironment(setting.experts, setting.slots, queue_nodes, penalty="off", metrics="off")
    params, keys = setting.params(), partial(jax.random.split, num=setting.num_envs)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        observation, state = carry
        actions = shortest_queue((), observation, env.queue_lengths(state), key)
        return jax.vmap(env.step, (0, 0, 0, None))(keys(key), state, actions, params)[:2], None

    def run(key: jax.Array) -> RoutingGraph:
        first = jax.vmap(env.reset, (0, None))(keys(key), params)
        return jax.lax.scan(step, first, jax.random.split(key, 2 * SETTLED_STEPS))[0][0]

    return jax.jit(run)(jax.random.key(0))


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of the seconds of each call. The first calls, which may compile, do not count."""
    seconds = {name: [] for name in calls}
    for turn in range(1 + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def encoder_rows(experts: int, batches: Sequence[int], overrides: Sequence[str], repeats: int) -> list[Row]:
    """A row for each batch size and number of queue nodes: milliseconds of the encoder, alone and with gradients."""
    networks = {kind: build_network(load_config(None, [*overrides, f"network.kind={kind}"]).network) for kind in KINDS}

    def encode(network: Any, params: Any, obs: RoutingGraph) -> Any:
        embedding = network.apply(params, obs, method="encode")
        return embedding.arrived, embedding.expert

    def gradient(network: Any, params: Any, obs: RoutingGraph) -> Any:
        return jax.grad(lambda params: sum((x**2).sum() for x in encode(network, params, obs)))(params)

    rows = []
    for queue_nodes in QUEUE_NODES:
        most = observations(Setting(max(batches), experts, float(experts)), queue_nodes)
        for batch in batches:
            obs = jax.tree.map(lambda leaf, batch=batch: leaf[:batch], most)
            params = jax.jit(networks["han"].init)(jax.random.key(0), obs)
            calls = {
                f"{name}_{kind}": partial(jax.jit(partial(function, network)), params, obs)
                for name, function in (("forward", encode), ("gradient", gradient))
                for kind, network in networks.items()
            }
            seconds = in_turns(calls, repeats)
            requests = float((obs.running_mask.sum() + obs.waiting_mask.sum()) / batch)
            row = {"experts": experts, "queue_nodes": str(queue_nodes), "batch": batch, "requests": requests}
            rows.append({**row, **{name: 1000 * value for name, value in seconds.items()}})
            print(f"encoder: {rows[-1]}", file=sys.stderr)
    return rows


def training_rows(experts: int, overrides: Sequence[str], repeats: int) -> list[Row]:
    """A row for each number of queue nodes: frames/s of chunks that learn, and compile times, cold."""
    rows = []
    for queue_nodes in QUEUE_NODES:
        row: Row = {"experts": experts, "queue_nodes": str(queue_nodes)}
        calls, frames = {}, 0
        for kind in KINDS:
            changes = [
                f"environment.id=paper-{experts}",
                f"network.kind={kind}",
                f"environment.queue_nodes={queue_nodes}",
            ]
            experiment = build_experiment(load_config(None, ["agent.warmup_frames=0", *changes, *overrides]))
            inputs = experiment.params, experiment.hyperparameters
            trainer = make_trainer(experiment.env, experiment.network, experiment.sac)
            state = [trainer.init(jax.random.key(0), *inputs)]
            start = time.perf_counter()
            program = trainer.train_chunk.lower(state[0], *inputs).compile()  # pyright: ignore[reportFunctionMemberAccess]
            row[f"compile_{kind}"] = time.perf_counter() - start

            def call(program: Any = program, state: list[Any] = state, inputs: Any = inputs) -> Any:
                state[0], metrics = program(state[0], *inputs)
                return metrics["critic_loss"]

            calls[kind] = call
            stored = jax.tree.leaves((state[0].buffer.observations, state[0].buffer.outcomes))
            row["transition_bytes"] = sum(leaf[0, 0].nbytes for leaf in stored)
            frames = experiment.sac.num_envs * experiment.sac.steps_per_chunk
        row |= {f"frames_{kind}": frames / seconds for kind, seconds in in_turns(calls, repeats).items()}
        rows.append(row)
        print(f"training: {row}", file=sys.stderr)
    return rows


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("encoder", __doc__)
    parser.add_argument("--experts", type=int, choices=(3, 6), nargs="+", help="experts (default 3 6)")
    parser.add_argument("--batches", type=count, nargs="+", metavar="B", help="batch sizes (default 1 64 256)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change of the configuration, key as in a.b")
    parser.add_measuring()
    arguments = parser.read(argv)
    quick, repeats = arguments.quick, arguments.repeats
    batches = arguments.batches or ([64] if quick else [1, 64, 256])
    chunk = [f"training.steps_per_chunk={5 if quick else 25}", *arguments.overrides]
    encoder, training = [], []
    for experts in arguments.experts or ([3] if quick else [3, 6]):
        encoder += encoder_rows(experts, batches, arguments.overrides, 4 * repeats)
        training += training_rows(experts, chunk, repeats)
    tables = [
        table("encoder, medians", ENCODER_COLUMNS, encoder, "requests: at all experts together, those observed"),
        table("training, medians", TRAINING_COLUMNS, training, ""),
    ]
    record = {"entry": "encoder", "machine": machine(argv, "encoder"), "rows": encoder, "training": training}
    report(tables, record, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
