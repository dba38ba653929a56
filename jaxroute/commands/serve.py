"""`jaxroute serve ROUTER --cluster experts.yaml`: routes the requests of clients to OpenAI-compatible servers."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxroute.errors import UserError, command
from jaxroute.routers import ROUTERS
from jaxroute.serving.predictions import FIRST_LENGTH


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

        from jaxroute.serving.build import make_dispatcher
        from jaxroute.serving.front_end import FrontEnd, Limits
        from jaxroute.serving.server import serve
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with pip install 'jaxroute[serve]'") from None

    jax.config.update("jax_platforms", "cpu")
    dispatcher = make_dispatcher(
        arguments.router,
        arguments.cluster,
        predictor=arguments.predictor,
        never_drop=arguments.never_drop,
        record=arguments.record,
    )
    # What is there now stays: a collection that walks over all of JAX stops every stream for 0.2 s.
    gc.collect()
    gc.freeze()
    key = arguments.api_key or os.environ.get("JAXROUTE_API_KEY") or None
    front_end = FrontEnd(dispatcher, Limits(silent_seconds=arguments.silent_seconds), key)

    def ready(port: int) -> None:
        predicted = (
            f"running means, from {FIRST_LENGTH:.0f} tokens on, and the file's mean scores"
            if arguments.predictor is None
            else str(arguments.predictor)
        )
        cluster, log = dispatcher.cluster, dispatcher.statistics.log
        names = [expert.name for expert in cluster.experts]
        print(f"{arguments.router} routes to {', '.join(names)}; limit {1000 * dispatcher.limit.of(1):g} ms a token")
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
