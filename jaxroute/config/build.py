"""Builds the environment, network and learner that a configuration describes."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.agent.flat_network import FlatNetwork
from jaxroute.agent.router_network import RouterNetwork
from jaxroute.agent.sac import Hyperparameters
from jaxroute.agent.trainer import SACConfig, Trainer, make_trainer
from jaxroute.config.schema import (
    ArrivalsConfig,
    Config,
    EnvironmentConfig,
    NetworkConfig,
    TrainingConfig,
    WorkloadConfig,
)
from jaxroute.environment.abandonment import require_cancelling
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.random_clusters import random_cluster
from jaxroute.environment.registry import SCENARIOS, make
from jaxroute.environment.settings import Features
from jaxroute.environment.signals import require_counts
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineParams
from jaxroute.workload import (
    PiecewiseArrivals,
    PoissonArrivals,
    TableRequests,
    TraceArrivals,
    TraceRequests,
    Workload,
    load_mixinstruct,
    load_trace,
)
from jaxroute.workload.arrivals import Arrivals
from jaxroute.workload.reading import Reading, collect_readings
from jaxroute.workload.table import Trace

OF_CLUSTERS = ("number", "num_experts", "two_limits")
"""Keys of the environment's section that only random-cluster has."""

OPTIONAL = ("ttft_limit", "tpot_limit", "token_price", "patience", "signal_delay")
"""Keys of the environment's section that are fields of `EnvParams` if they are set."""


class Experiment(NamedTuple):
    """The objects that a configuration describes, for training and evaluation."""

    env: RoutingEnvironment
    params: EnvParams  # for the evaluation
    network: nn.Module
    hyperparameters: Hyperparameters
    sac: SACConfig
    notes: list[str]  # remarks on the data for the user, one line each
    training_params: EnvParams  # leaves that differ between training environments have an additional leading axis
    params_axes: EnvParams  # axes of training_params: 0 for such a leaf, else None
    experts: tuple[str, ...]  # names
    readings: list[Reading]  # facts of the files that were read; `notes` has their lines


def build_experiment(config: Config) -> Experiment:
    """Reads the data that the configuration names. Raises `UserError` for an unknown name or unusable data."""
    with collect_readings() as readings:
        experiment = _build(config)
    lines = [f"read {line}" if not line.startswith("warning: ") else line for one in readings for line in one.lines()]
    return experiment._replace(notes=[*lines, *experiment.notes], readings=readings)


def _build(config: Config) -> Experiment:
    environment, training = config.environment, config.training
    # `make` takes all by the same names but what is traced, which is set below.
    own = ("id", "latency_limit", "penalty_weight", *OPTIONAL)
    options = {key: value for key, value in vars(environment).items() if key not in own and value is not None}
    for key in OF_CLUSTERS:
        if key in options and environment.id != "random-cluster":
            raise UserError(f"environment.{key}: only random-cluster has it; set environment.id=random-cluster")
    if training.start == "universal":
        _require_universal(config)
        options["features"] = observed_features(config)
    if config.workload.arrivals.kind is None:  # the scenario reads the trace, if there is one
        options |= _reading_options(config.workload.arrivals)
    try:
        env, params = make(environment.id, **options)
    except UserError as error:
        raise UserError(f"environment.id={environment.id}: {error}") from None
    if env.signals == "counts":
        _named("environment.signals", lambda: require_counts(params.engines))
    limit = params.latency_limit if environment.latency_limit is None else environment.latency_limit
    numbered = tuple(f"expert {number}" for number in range(env.num_experts))
    experts = environment.experts or SCENARIOS.get(environment.id, numbered)
    workload, notes = _workload(config.workload, params.workload, experts)
    params = params.replace(
        workload=workload,
        latency_limit=jnp.asarray(limit, float),
        penalty_weight=jnp.asarray(environment.penalty_weight, float),
        credit_discount=jnp.asarray(config.agent.gamma, float),
        **_optional_fields(environment, params.engines),
    )
    sac = SACConfig(
        num_envs=training.num_envs,
        buffer_capacity=training.buffer_capacity,
        batch_size=training.batch_size,
        updates_per_step=training.updates_per_step,
        # Limited by the training, so that a short training remains short.
        steps_per_chunk=min(training.steps_per_chunk, -(-training.frames // training.num_envs)),
    )
    agent, longest = asdict(config.agent), training.frames // 2
    if agent["warmup_frames"] > longest:
        notes.append(f"agent.warmup_frames cut to {longest}, half of training.frames")
        agent["warmup_frames"] = longest
    if training.clusters is None:
        varied, axes = _training_params(params, training)
    else:
        varied, axes = _training_clusters(env, params, config)
    network = build_network(config.network)
    agent["decay_updates"] = -(-training.frames // training.num_envs) * training.updates_per_step
    return Experiment(env, params, network, Hyperparameters(**agent), sac, notes, varied, axes, experts, [])


def _optional_fields(environment: EnvironmentConfig, engines: EngineParams) -> dict[str, jax.Array]:
    """The optional fields of `EnvParams` that the configuration sets. Raises `UserError`."""
    given = {name: getattr(environment, name) for name in OPTIONAL if getattr(environment, name) is not None}
    prices, experts = environment.token_price, len(engines.usable_blocks)
    if prices is not None and len(prices) != experts:
        raise UserError(f"environment.token_price: {len(prices)} numbers, but the environment has {experts} experts")
    if "patience" in given:
        require_cancelling(engines)
    return {name: jnp.asarray(value, float) for name, value in given.items()}


# A few per process, so that trainings that differ only in numbers are compiled once.
_trainer = lru_cache(maxsize=4)(make_trainer)


def build_trainer(experiment: Experiment) -> Trainer:
    """The training program of an experiment."""
    axes: Any = experiment.params_axes  # numbers and None: hashable, which its type does not say
    return _trainer(experiment.env, experiment.network, experiment.sac, axes)


def build_network(config: NetworkConfig) -> nn.Module:
    """The network of a configuration; it does not depend on the environment."""
    if config.kind == "flat":
        return FlatNetwork(config.mlp)
    path = "jraph" if config.kind == "han_jraph" else "dense"
    return RouterNetwork(config.hidden, config.heads, config.layers, config.residual, config.mlp, path)


def _training_params(params: EnvParams, training: TrainingConfig) -> tuple[EnvParams, EnvParams]:
    """The parameters of the training environments, and the axis over environments of each leaf.

    Values are spread evenly over a range on a logarithmic scale. With two ranges, the second one is permuted by steps
    of the golden ratio, so that every part of one range is combined with every part of the other.
    """
    axes: Any = jax.tree.map(lambda _: None, params)
    places = (np.arange(training.num_envs) + 0.5) / training.num_envs

    def spread(span: tuple[float, ...], places: np.ndarray) -> jax.Array:
        return jnp.asarray(span[0] * (span[1] / span[0]) ** places, float)

    if training.rate_range is not None:
        key = next((key for key in ("rate", "rate_scale") if hasattr(params.workload.arrivals, key)), None)
        if key is None:
            raise UserError(
                "training.rate_range: bursts and piecewise arrivals have no single rate; set workload.arrivals.kind to "
                "poisson or trace, or training.rate_range=null"
            )

        def with_rates(tree: EnvParams, value: Any) -> EnvParams:
            arrivals = replace(tree.workload.arrivals, **{key: value})
            return tree.replace(workload=replace(tree.workload, arrivals=arrivals))

        params, axes = with_rates(params, spread(training.rate_range, places)), with_rates(axes, 0)
    if training.latency_limit_range is not None:
        shuffled = np.arange(training.num_envs) * (np.sqrt(5) - 1) / 2 % 1
        params = params.replace(latency_limit=spread(training.latency_limit_range, shuffled))
        axes = axes.replace(latency_limit=0)
    return params, axes


def _training_clusters(env: RoutingEnvironment, params: EnvParams, config: Config) -> tuple[EnvParams, EnvParams]:
    """The first `training.clusters` random clusters in turn for the training environments, and the axes likewise.

    What the configuration sets is the same for all. Raises `UserError` for another environment than random-cluster.
    """
    environment, training = config.environment, config.training
    count, arrivals, requests = training.clusters, config.workload.arrivals, config.workload.requests
    if environment.id != "random-cluster" or count is None:
        raise UserError("training.clusters: only random-cluster has clusters; set environment.id=random-cluster")
    if count > training.num_envs:
        raise UserError(f"training.clusters: {count} clusters for {training.num_envs} environments; raise num_envs")
    others = training.rate_range, training.latency_limit_range, arrivals.kind, requests.true_lengths or None
    if any(value is not None for value in others) or requests.kind != "frozen":
        raise UserError(
            "training.clusters: each cluster has its own requests, rate and limit; leave the workload, "
            "training.rate_range and training.latency_limit_range out"
        )
    sizes = env.num_experts, env.slots, env.episode_length, bool(environment.two_limits)
    clusters = [random_cluster(number, *sizes) for number in range(count)]
    stacked: EnvParams = jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack(leaves)[np.arange(training.num_envs) % len(leaves)]), *clusters
    )
    axes: Any = jax.tree.map(lambda _: 0, stacked)
    fields = ["penalty_weight", "credit_discount"]
    fields += [name for name in ("latency_limit", *OPTIONAL) if getattr(environment, name) is not None]
    same = {name: getattr(params, name) for name in fields}
    return stacked.replace(**same), axes.replace(**jax.tree.map(lambda _: None, same))


def _named(key: str, check: Callable[[], None]) -> None:
    """Puts the name of a key in front of an error of `check`."""
    try:
        check()
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def observed_features(config: Config) -> Features:
    """The experts' features that the configuration's network reads."""
    if config.training.start == "universal":
        return "relative"
    return config.environment.features or "standard"


def _require_universal(config: Config) -> None:
    """Raises `UserError` for what a training that starts with the universal router cannot have."""
    if config.network.kind == "flat":
        raise UserError("training.start: universal needs the network han or han_jraph; set network.kind=han")
    if config.environment.features == "standard":
        raise UserError("training.start: universal needs its features; set environment.features=relative, or null")


def _workload(config: WorkloadConfig, own: Workload, experts: tuple[str, ...]) -> tuple[Workload, list[str]]:
    """The workload and notes on it; `own` is the workload of the scenario."""
    arrivals, requests, notes = config.arrivals, config.requests, []
    trace = None
    if arrivals.kind == "trace" and arrivals.path:
        trace = load_trace(arrivals.path, **_reading_options(arrivals))
    when = _arrivals(arrivals, own.arrivals, trace)
    if requests.kind == "jsonl" and requests.path:
        names = requests.experts or ()
        if len(names) != len(experts):
            raise UserError(
                f"workload.requests.experts: {len(names)} models for {len(experts)} experts; name one for each of "
                f"environment.experts ({', '.join(experts)})"
            )
        table = load_mixinstruct(
            requests.path, names, requests.score, requests.max_prompt_tokens, requests.max_output_tokens
        )
        what = TableRequests.create(table)
    elif requests.kind == "trace" and trace is not None:
        if isinstance(own.requests, TableRequests):
            raise UserError(
                "workload.requests.kind: trace needs mean scores of experts; the scenario has recorded ones"
            )
        scores = np.asarray(own.requests.score_mean)
        what = TraceRequests.create(trace.prompt_tokens, trace.output_tokens, scores)
    else:
        what = own.requests
    return Workload.create(when, what, requests.true_lengths), notes


def _reading_options(config: ArrivalsConfig) -> dict[str, Any]:
    """Options of `load_trace` that are set."""
    return {key: getattr(config, key) for key in ("spread_ticks", "time_unit", "run") if getattr(config, key)}


def _arrivals(config: ArrivalsConfig, own: Arrivals, trace: Trace | None) -> Arrivals:
    if trace is not None:
        try:
            return TraceArrivals.create(trace.times, config.rate_scale or 1.0, config.start)
        except UserError as error:
            raise UserError(f"workload.arrivals: {config.path}: {error}") from None
    if config.kind == "piecewise":
        return PiecewiseArrivals.create(config.durations, config.rates)
    if config.kind == "poisson":
        rate = config.rate or getattr(own, "rate", None)
        if rate is None:
            raise UserError("workload.arrivals.rate: missing; the scenario's arrivals have no single rate")
        return PoissonArrivals.create(float(rate))
    changes = {}
    for key in ("rate", "rate_scale", "path", "start", "durations", "rates"):
        value = getattr(config, key)
        if value not in (None, ()):
            if key not in ("rate", "rate_scale") or not hasattr(own, key):
                raise UserError(
                    f"workload.arrivals.{key}: the scenario's arrivals have no such value; set workload.arrivals.kind"
                )
            changes[key] = jnp.asarray(value, float)
    return replace(own, **changes)
