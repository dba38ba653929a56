"""The server process: starts the front end, serves until a signal comes, and lets open requests end."""

import asyncio
import logging
import signal
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from jaxroute.errors import UserError
from jaxroute.serving.front_end import FrontEnd
from jaxroute.serving.sidecar import Sidecar

LOGGER = logging.getLogger("jaxroute.serving")

BACKLOG = 4096
"""Connections that may wait to be accepted, as when clients come all at once; the system may have a lower limit."""


async def serve(
    front_end: FrontEnd, host: str, port: int, drain_seconds: float, ready: Callable[[int], None] = lambda port: None
) -> None:
    """Serves until SIGTERM or SIGINT, then takes no new requests and waits `drain_seconds` for the open ones.

    `ready` is called with the port, which the system chooses if `port` is 0. A second signal ends at once.
    Raises `UserError` if the port cannot be used.
    """
    stop, loop = front_end.stopping, asyncio.get_running_loop()
    app = front_end.application()
    Sidecar(front_end).add_to(app)
    largest = front_end.limits.header_bytes
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_server_logger(),
        handler_cancellation=True,
        shutdown_timeout=1.0,
        max_line_size=largest,
        max_field_size=largest,
        keepalive_timeout=front_end.limits.client_seconds,
        lingering_time=2.0,
    )
    await runner.setup()
    assert runner.server is not None
    front_end.connections = lambda: runner.server.connections if runner.server else []  # pyright: ignore
    try:
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"--port {port}: cannot be used on {host} ({reason}); choose another port") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        ready(runner.addresses[0][1])
        await stop.wait()
        await _drain(front_end, site, drain_seconds)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await runner.cleanup()
        front_end.dispatcher.statistics.close()


def _server_logger() -> logging.Logger:
    """The logger of aiohttp's server without its tracebacks of clients that do not speak HTTP: they get a 400."""
    logger = logging.getLogger("jaxroute.serving.http")
    if not logger.filters:
        logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
    return logger


async def _drain(front_end: FrontEnd, site: web.TCPSite, seconds: float) -> None:
    front_end.draining = True
    again, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, again.set)
    await site.stop()
    LOGGER.warning("shutting down: %d requests are open", front_end.open)
    deadline = loop.time() + seconds
    while front_end.open and loop.time() < deadline and not again.is_set():
        await asyncio.sleep(0.05)
    if front_end.open:
        LOGGER.warning("%d requests were cut off", front_end.open)
