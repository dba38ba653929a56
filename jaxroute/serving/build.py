"""A dispatcher for the servers of a cluster's file, from which `jaxroute serve` and the adapters start."""

from pathlib import Path

import jax

from jaxroute.agent.trainer import policy_router
from jaxroute.config.build import OF_CLUSTERS, build_network, observed_features
from jaxroute.config.loader import load_saved_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import make, params_of
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.predictor.store import load_predictor
from jaxroute.routers import ROUTERS, SLOW, make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params
from jaxroute.runs.run_folder import require_run_or_router
from jaxroute.serving.cluster import Cluster, load_cluster
from jaxroute.serving.decision import Decider
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.log import Log
from jaxroute.serving.openai import Limit
from jaxroute.serving.predictions import Predictions
from jaxroute.serving.statistics import Statistics
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload

LATENCY_LIMIT, TOKEN_SCALE = 0.03, 256.0
"""s per output token, and tokens that count as 1, unless the cluster's file or the run has others."""


def make_dispatcher(
    router: str,
    cluster: Cluster | Path | str,
    *,
    predictor: Path | None = None,
    never_drop: bool = False,
    record: Path | None = None,
) -> Dispatcher:
    """A dispatcher whose program is compiled, for a cluster or for the servers of the file `cluster`.

    `router` is a name or the folder of a run, `predictor` a folder of `jaxroute predict train`, `record` the LOG.jsonl
    to write. Raises `UserError`.
    """
    # Dispatched asynchronously, a decision would wait for a thread that other work may keep from running.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    servers = cluster if isinstance(cluster, Cluster) else load_cluster(Path(cluster))
    names = [expert.name for expert in servers.experts]
    stored = None if predictor is None else load_predictor(predictor)
    predictions = Predictions(names, [expert.mean_score for expert in servers.experts], stored)
    env, rule, params = router_of(router, servers, never_drop)
    log = None if record is None else Log(record, names)
    limit = Limit(per_token=float(params.latency_limit))
    if log is not None:
        log.begin(router, servers, params.engines, limit.of(1))
    dispatcher = Dispatcher(servers, Decider(env, rule, params), predictions, limit, Statistics(names, log))
    dispatcher.warm_up()
    return dispatcher


def router_of(name: str, cluster: Cluster, never_drop: bool = False) -> tuple[RoutingEnvironment, Router, EnvParams]:
    """The environment of the cluster, the router of this name or run folder, and parameters. Raises `UserError`."""
    run, count = Path(name), len(cluster.experts)
    limit, scale, queue_nodes, features, network = LATENCY_LIMIT, TOKEN_SCALE, 10, "standard", None
    if name not in ROUTERS:
        require_run_or_router(run)
        config = load_saved_config(run / "config.yaml")
        network, queue_nodes = build_network(config.network), config.environment.queue_nodes
        features = observed_features(config)
        # Times and lengths in the observation are relative to these two, so they are as in training.
        chosen = {key: getattr(config.environment, key) for key in ("path", "profile", "experts", *OF_CLUSTERS)}
        trained = make(config.environment.id, **{key: value for key, value in chosen.items() if value is not None})[1]
        limit = config.environment.latency_limit or float(trained.latency_limit)
        scale = float(trained.token_scale)
    elif not ROUTERS[name].honest:
        raise UserError(f"{name} routes by true lengths, which no live request has; lookahead uses predicted ones")
    elif name in SLOW:
        raise UserError(f"{name} simulates thousands of decisions for each of its own, and is too slow; use lookahead")
    env = RoutingEnvironment(
        num_experts=count,
        slots=cluster.slots,
        queue_nodes=queue_nodes,
        features=features,
        penalty="off",
        metrics="off",
        drop=not never_drop,
    )
    scores = [expert.mean_score for expert in cluster.experts]
    params = params_of(
        Workload.create(PoissonArrivals.create(1.0), FrozenRequests.create(scores)),
        cluster.engines,
        cluster.latency_limit or limit,
        cluster.token_scale or scale,
    )
    if network is None:
        return env, make_router(name, env), params
    return env, policy_router(network, load_params(run, network, env, params)), params
