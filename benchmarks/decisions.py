"""Routing decisions per second over batch sizes, experts, loads and slots: shared by advance, environment and policy.

Each benchmark has a `Rollout`: a scan of `steps` steps over a batch of environments. Each call continues from the state
of the previous one. Untimed calls at first bring the queues to their steady length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from benchmarks.baselines import Baselines, event_note
from benchmarks.harness import (
    Column,
    Parser,
    Row,
    count,
    machine,
    measure,
    rate,
    report,
    table,
    tree_bytes,
    use_devices,
)
from jaxroute.environment.registry import make_params
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload

SETTLED_STEPS = 48  # number of steps after which initially empty queues have about their steady length


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    num_envs: int
    experts: int = 6
    rate: float = 6.0  # requests/s per environment
    slots: int = 48
    shards: int = 1  # devices that share the environments; a CPU device is a core, or a part of the cores
    steps: int | None = None  # steps of every environment per call; None: for calls of about a second on two cores
    episode_length: int = 5000  # requests, as in training

    def __str__(self) -> str:
        load = f"{self.experts} experts, {self.rate:g} requests/s, {self.slots} slots"
        shared = f" on {self.shards} devices" if self.shards > 1 else ""
        return f"{load}, {self.num_envs:,} environments{shared}"

    @property
    def steps_per_call(self) -> int:
        decisions = 2**16 if jax.default_backend() == "cpu" else 2**21
        return self.steps or min(max(decisions // self.num_envs, 4), 1000)

    def params(self) -> EnvParams:
        """Engines and requests as in `paper-6`; for more experts, the list of experts is repeated."""
        names = list(itertools.islice(itertools.cycle(EXPERTS), self.experts))
        requests = FrozenRequests.create([EXPERTS[name].mean_score for name in names])
        return make_params(names, workload=Workload.create(PoissonArrivals.create(self.rate), requests))


class Scan(NamedTuple):
    """`run(carry, key, *inputs) -> (carry, (mean QoS per decision, ...))` over `steps_per_call` steps."""

    run: Callable[..., tuple[Any, tuple[Any, ...]]]
    carry: Any
    inputs: Sequence[Any]
    state: Any  # state of the environments, whose size is reported


Rollout = Callable[[Setting, EnvParams], Scan]

COLUMNS = (
    Column("experts", "experts"),
    Column("rate", "req/s", "g"),
    Column("slots", "slots"),
    Column("num_envs", "envs"),
    Column("shards", "shards"),
    Column("slowest", "slowest"),
    Column("median", "median"),
    Column("fastest", "fastest"),
    Column("compile_seconds", "compile, s", ".1f"),
    Column("state_bytes", "state, B"),
    Column("traffic_share", "XLA traffic", ".0%"),
    Column("state_share", "2 x state", ".2%"),
    Column("times_event", "x events", ".3f"),
    Column("times_python", "x Python", ",.1f"),
    Column("qos", "QoS", ".3f"),
)


@cache
def _baselines(experts: int, rate: float, slots: int) -> Baselines:
    return Baselines(Setting(1, experts, rate, slots).params(), slots)


def sharded(rollout: Rollout, setting: Setting, params: EnvParams) -> Scan:
    """The rollout of all environments, divided evenly among the devices, without communication."""
    scan = rollout(setting, params)
    if setting.shards == 1:
        return scan
    part = rollout(replace(setting, num_envs=setting.num_envs // setting.shards, steps=setting.steps_per_call), params)
    mesh = jax.make_mesh((setting.shards,), ("device",), devices=jax.devices()[: setting.shards])

    def run(carry: Any, key: jax.Array, *inputs: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(key, jax.lax.axis_index("device"))
        carry, output = part.run(carry, key, *inputs)
        return carry, jax.tree.map(lambda leaf: leaf[None], output)

    each = PartitionSpec("device")
    inputs = [PartitionSpec()] * (1 + len(scan.inputs))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(each, *inputs), out_specs=(each, each), check_vma=False)

    def run_all(carry: Any, key: jax.Array, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        carry, output = mapped(carry, key, *inputs)
        return carry, jax.tree.map(lambda leaf: leaf.mean(0), output)

    return scan._replace(run=run_all, carry=jax.device_put(scan.carry, NamedSharding(mesh, each)))


def measure_setting(rollout: Rollout, setting: Setting, repeats: int, quick: bool) -> Row:
    """One row: rates in decisions/s, compile time, bytes, shares of the limits, and ratios to the baselines."""
    steps = setting.steps_per_call
    scan = sharded(rollout, setting, setting.params())
    state_bytes = tree_bytes(scan.state) / setting.num_envs
    warm_up = 1 if quick else -(-SETTLED_STEPS // steps)
    row, _, (qos, *_) = measure(scan.run, scan.carry, scan.inputs, setting.num_envs * steps, repeats, warm_up)
    decisions = row["median"]
    baselines = _baselines(setting.experts, setting.rate, setting.slots)
    return {
        **asdict(replace(setting, steps=steps)),
        **row,
        "state_bytes": state_bytes,
        "traffic_share": row["step_bytes"] * decisions / setting.num_envs / row["bandwidth"],
        "state_share": 2 * state_bytes * decisions / row["bandwidth"],
        **baselines.measure(decisions, 0.2 if quick else 0.5),
        "qos": float(qos),
    }


def decisions_table(title: str, rows: Sequence[Row]) -> Table:
    caption = (
        f"{event_note(rows)}. XLA traffic: bytes that a step accesses by XLA's cost analysis, with every inner loop's "
        "body once, caches included; 2 x state: reading and writing the state once; both at the median rate, over the "
        f"measured memory bandwidth ({rows[0]['bandwidth'] / 1e9:.3g} GB/s in the first row)"
    )
    return table(f"{title}: decisions/s", COLUMNS, rows, caption)


def main(entry: str, description: str | None, rollout: Rollout, argv: Sequence[str] | None) -> int:
    """The command of a benchmark: one row for every combination of its options."""
    parser = Parser(entry, description)
    parser.add_argument("--num-envs", type=count, nargs="+", metavar="B", help="batch sizes (default 64 256 1024)")
    parser.add_argument("--experts", type=count, nargs="+", default=[6], metavar="N", help="experts (default 6)")
    parser.add_argument("--rates", type=rate, nargs="+", default=[6.0], metavar="R", help="requests/s (default 6)")
    parser.add_argument(
        "--slots", type=count, nargs="+", default=[48], metavar="S", help="slots per expert (default 48)"
    )
    parser.add_argument(
        "--shards",
        type=count,
        nargs="+",
        default=[1],
        metavar="D",
        help="devices that share the environments (default 1)",
    )
    parser.add_argument("--steps", type=count, help="steps per call (default: for calls of about a second)")
    parser.add_argument(
        "--episode-length", type=count, default=5000, help="requests per episode (default 5000, as in training)"
    )
    parser.add_measuring()
    arguments = parser.read(argv)
    batches = arguments.num_envs or ([64] if arguments.quick else [64, 256, 1024])
    use_devices(max(arguments.shards))
    for num_envs, shards in itertools.product(batches, arguments.shards):
        if num_envs % shards:
            raise UserError(f"--num-envs {num_envs} is not a multiple of --shards {shards}")
    rows = []
    for experts, load, slots, num_envs, shards in itertools.product(
        arguments.experts, arguments.rates, arguments.slots, batches, arguments.shards
    ):
        setting = Setting(num_envs, experts, load, slots, shards, arguments.steps, arguments.episode_length)
        rows.append(measure_setting(rollout, setting, arguments.repeats, arguments.quick))
    record = {"entry": entry, "machine": machine(argv, entry), "rows": rows}
    report([decisions_table(entry, rows)], record, arguments.json)
    return 0
