"""`jaxroute serve ROUTER --cluster experts.yaml`: routes the requests of clients to OpenAI-compatible servers."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxroute.agent.trainer import policy_router
from jaxroute.commands.evaluate import require_run_or_router
from jaxroute.config.build import build_network
from jaxroute.config.loader import load_saved_config
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import make, params_of
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, command
from jaxroute.predictor.store import load_predictor
from jaxroute.routers import ROUTERS, SLOW, make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params
from jaxroute.serving.cluster import Cluster, load_cluster
from jaxroute.serving.decision import Decider
from jaxroute.serving.openai import Limit
from jaxroute.serving.predictions import FIRST_LENGTH, Predictions
from jaxroute.workload import FrozenRequests, PoissonArrivals, Workload

LATENCY_LIMIT, TOKEN_SCALE = 0.03, 256.0
"""s per output token, and tokens that count as 1, unless the cluster's file or the run has others."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute serve",
        description="Route requests to OpenAI-compatible servers, behind one OpenAI-compatible front end. "
        "The status page is at /, metrics are at /metrics.",
        epilog="Example: jaxroute serve shortest_queue --cluster experts.yaml --port 8080. The file's format: "
        f"docs/serve.md. Routers: {', '.join(ROUTERS)}",
    )
    parser.add_argument("router", metavar="ROUTER", help="name of a router, or folder that jaxroute train wrote")
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="YAML file of the experts")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    parser.add_argument("--predictor", type=Path, metavar="DIR", help="folder that jaxroute predict train wrote")
    parser.add_argument("--never-drop", action="store_true", help="send every request to some expert")
    parser.add_argument(
        "--record", type=Path, metavar="LOG.jsonl", help="write LOG.jsonl, and LOG.NAME.jsonl for each expert"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send (default: the environment's JAXROUTE_API_KEY)"
    )
    parser.add_argument(
        "--silent-seconds", type=float, default=60.0, metavar="S",
        help="an expert with open requests that sends nothing for so long has failed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--drain-seconds", type=float, default=60.0, metavar="S",
        help="time for open requests to end after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    for name in ("silent_seconds", "drain_seconds"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a number of seconds above 0")
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port {arguments.port}: must be from 0 to 65535")
    try:
        import uvloop

        from jaxroute.serving.dispatch import Dispatcher
        from jaxroute.serving.front_end import FrontEnd, Limits
        from jaxroute.serving.log import Log
        from jaxroute.serving.server import serve
        from jaxroute.serving.statistics import Statistics
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with pip install 'jaxroute[serve]'") from None

    # Dispatched asynchronously, a decision would wait for a thread that other work may keep from running.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_platforms", "cpu")

    cluster = load_cluster(arguments.cluster)
    names = [expert.name for expert in cluster.experts]
    stored = None if arguments.predictor is None else load_predictor(arguments.predictor)
    predictions = Predictions(names, [expert.mean_score for expert in cluster.experts], stored)
    env, router, params = router_of(arguments.router, cluster, arguments.never_drop)
    log = None if arguments.record is None else Log(arguments.record, names)
    limit = Limit(per_token=float(params.latency_limit))
    if log is not None:
        log.begin(arguments.router, cluster, params.engines, limit.of(1))
    dispatcher = Dispatcher(cluster, Decider(env, router, params), predictions, limit, Statistics(names, log))
    dispatcher.warm_up()
    key = arguments.api_key or os.environ.get("JAXROUTE_API_KEY") or None
    front_end = FrontEnd(dispatcher, Limits(silent_seconds=arguments.silent_seconds), key)

    def ready(port: int) -> None:
        predicted = (
            f"running means, from {FIRST_LENGTH:.0f} tokens on, and the file's mean scores"
            if stored is None
            else str(arguments.predictor)
        )
        print(f"{arguments.router} routes to {', '.join(names)}; limit {1000 * limit.of(1):g} ms a token")
        print(f"lengths and scores are predicted by {predicted}")
        if log is not None:
            print(f"requests are recorded in {', '.join(map(str, (log.path, *log.paths)))}")
        print(f"model {cluster.model} at http://{arguments.host}:{port}/v1; status at http://{arguments.host}:{port}/")
        sys.stdout.flush()

    logger, handler = logging.getLogger("jaxroute.serving"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    uvloop.run(serve(front_end, arguments.host, arguments.port, arguments.drain_seconds, ready))
    return 0


def router_of(name: str, cluster: Cluster, never_drop: bool) -> tuple[RoutingEnvironment, Router, EnvParams]:
    """The environment of the cluster, the router of this name or run folder, and parameters."""
    run, count = Path(name), len(cluster.experts)
    limit, scale, queue_nodes, network = LATENCY_LIMIT, TOKEN_SCALE, 10, None
    if name not in ROUTERS:
        require_run_or_router(run)
        config = load_saved_config(run / "config.yaml")
        network, queue_nodes = build_network(config.network), config.environment.queue_nodes
        # Times and lengths in the observation are relative to these two, so they are as in training.
        chosen = {key: getattr(config.environment, key) for key in ("path", "profile", "experts")}
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
