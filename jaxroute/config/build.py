"""From a configuration to the environment, network and learner that it describes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.config.schema import Config, NetworkConfig, TrainingConfig, WorkloadConfig
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import SCENARIOS, make_params
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, known
from jaxroute.learner.sac import Hyperparameters
from jaxroute.learner.trainer import SACConfig
from jaxroute.network.flat_network import FlatNetwork
from jaxroute.network.router_network import RouterNetwork
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.workload import (
    FrozenRequests,
    PiecewiseArrivals,
    PoissonArrivals,
    TableRequests,
    TraceArrivals,
    TraceRequests,
    Workload,
    load_mixinstruct,
    load_trace,
)


class Experiment(NamedTuple):
    """What a configuration describes, ready to train or evaluate."""

    env: RoutingEnvironment
    params: EnvParams  # those of the evaluation
    network: nn.Module
    hyperparameters: Hyperparameters
    sac: SACConfig
    notes: list[str]  # what the user should know of the data, a line each
    training_params: EnvParams  # leaves that differ between the environments of training have one more leading axis
    params_axes: EnvParams  # of training_params: 0 for such a leaf, else None


def build(config: Config) -> Experiment:
    """Reads the data that the configuration names. Raises `UserError` for an unknown name or unusable data."""
    environment, training = config.environment, config.training
    scenario = SCENARIOS[known(environment.id, SCENARIOS, "environment id")]
    experts = [known(expert, EXPERTS, "expert") for expert in environment.experts or scenario]
    for key in ("profile", "kv_cache_tokens"):
        value = getattr(environment, key)
        if isinstance(value, tuple) and len(value) != len(experts):
            raise UserError(
                f"environment.{key}: a list of {len(value)} for {len(experts)} experts; give one value for all, or one "
                f"for each of {', '.join(experts)}"
            )
    workload, notes = _workload(config.workload, experts)
    env = RoutingEnvironment(
        num_experts=len(experts),
        slots=environment.slots,
        queue_nodes=environment.queue_nodes,
        episode_length=environment.episode_length,
        penalty=environment.penalty,
        drop=environment.drop,
    )
    params = make_params(
        experts,
        profile=environment.profile,
        workload=workload,
        latency_limit=environment.latency_limit,
        penalty_weight=environment.penalty_weight,
        kv_cache_tokens=environment.kv_cache_tokens,
        discipline=environment.discipline,
        max_model_len=environment.max_model_len,
    )
    sac = SACConfig(
        num_envs=training.num_envs,
        buffer_capacity=training.buffer_capacity,
        batch_size=training.batch_size,
        updates_per_step=training.updates_per_step,
        # No longer than the training, so that a short one stays short.
        steps_per_chunk=min(training.steps_per_chunk, -(-training.frames // training.num_envs)),
    )
    agent, longest = asdict(config.agent), training.frames // 2
    if agent["warmup_frames"] > longest:
        notes.append(f"agent.warmup_frames cut to {longest}, half of training.frames")
        agent["warmup_frames"] = longest
    params = params.replace(credit_discount=jnp.asarray(config.agent.gamma, float))
    varied, axes = _training_params(params, training)
    network = build_network(config.network)
    agent["decay_updates"] = -(-training.frames // training.num_envs) * training.updates_per_step
    return Experiment(env, params, network, Hyperparameters(**agent), sac, notes, varied, axes)


def build_network(config: NetworkConfig) -> nn.Module:
    """The network of a configuration, whatever its environment."""
    if config.kind == "flat":
        return FlatNetwork(config.mlp)
    return RouterNetwork(config.hidden, config.heads, config.layers, config.residual, config.mlp)


def _training_params(params: EnvParams, training: TrainingConfig) -> tuple[EnvParams, EnvParams]:
    """The parameters of the environments of training, and the axis over environments of each leaf.

    Ranges are spread evenly on a logarithmic scale. Where there are two, every part of one meets every part of the
    other: their places follow each other by the golden ratio.
    """
    axes: Any = jax.tree.map(lambda _: None, params)
    places = (np.arange(training.num_envs) + 0.5) / training.num_envs

    def spread(span: tuple[float, ...], places: np.ndarray) -> jax.Array:
        return jnp.asarray(span[0] * (span[1] / span[0]) ** places, float)

    if training.rate_range is not None:
        key = "rate" if isinstance(params.workload.arrivals, PoissonArrivals) else "rate_scale"

        def with_rates(tree: EnvParams, value: Any) -> EnvParams:
            arrivals = replace(tree.workload.arrivals, **{key: value})
            return tree.replace(workload=replace(tree.workload, arrivals=arrivals))

        params, axes = with_rates(params, spread(training.rate_range, places)), with_rates(axes, 0)
    if training.latency_limit_range is not None:
        shuffled = np.arange(training.num_envs) * (np.sqrt(5) - 1) / 2 % 1
        params = params.replace(latency_limit=spread(training.latency_limit_range, shuffled))
        axes = axes.replace(latency_limit=0)
    return params, axes


def _workload(config: WorkloadConfig, experts: list[str]) -> tuple[Workload, list[str]]:
    arrivals, requests, notes = config.arrivals, config.requests, []
    trace = load_trace(arrivals.path) if arrivals.kind == "trace" and arrivals.path else None
    if trace is not None:
        try:
            when = TraceArrivals.create(trace.times, arrivals.rate_scale, arrivals.start)
        except UserError as error:
            raise UserError(f"workload.arrivals: {arrivals.path}: {error}") from None
    elif arrivals.kind == "piecewise":
        when = PiecewiseArrivals.create(arrivals.durations, arrivals.rates)
    else:
        when = PoissonArrivals.create(arrivals.rate)

    scores = [EXPERTS[expert].mean_score for expert in experts]
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
        if table.predictions_made:
            notes.append(
                f"{requests.path}: no pred_output_tokens or pred_score; predictions are the truth with the frozen "
                "generator's errors"
            )
        if table.tokens_estimated:
            notes.append(f"{requests.path}: no token counts; they are estimated from the number of words")
        what = TableRequests.create(table)
    elif requests.kind == "trace" and trace is not None:
        what = TraceRequests.create(trace.prompt_tokens, trace.output_tokens, scores)
    else:
        what = FrozenRequests.create(scores)
    return Workload.create(when, what, requests.true_lengths), notes
