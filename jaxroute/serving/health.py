"""Which experts are up: one that fails leaves the action mask, and is asked for its health until it is back."""

import asyncio
import logging
import time

import aiohttp
import numpy as np

from jaxroute.serving.cluster import Expert

LOGGER = logging.getLogger("jaxroute.serving")

PROBE_SECONDS = 2.0
"""An expert whose health takes longer to answer is not up."""

LONGEST_WAIT = 30.0
"""Seconds between probes at most. The wait doubles with each failure since the last request that completed."""


class Health:
    """Keeps `up`, bool [N], which others read."""

    def __init__(self, experts: tuple[Expert, ...], up: np.ndarray):
        self._experts, self.up = experts, up
        self._failures = np.zeros(len(experts), int)
        self._next_probe = np.zeros(len(experts))
        self._probing: dict[int, asyncio.Task[None]] = {}

    def failed(self, expert: int, reason: str) -> None:
        """Takes the expert out, for the reason that the log has."""
        if self.up[expert]:
            LOGGER.warning("expert %s is down: %s", self._experts[expert].name, reason)
            self._failures[expert] += 1
        self.up[expert] = False
        wait = min(0.1 * 2.0 ** min(self._failures[expert] - 1, 20), LONGEST_WAIT)
        self._next_probe[expert] = time.monotonic() + wait

    def worked(self, expert: int) -> None:
        """A request has completed there."""
        self._failures[expert] = 0

    def probe_due(self, session: aiohttp.ClientSession) -> None:
        """Starts the probes that are due."""
        for expert in np.flatnonzero(~self.up & (self._next_probe <= time.monotonic())):
            if int(expert) not in self._probing:
                self._probing[int(expert)] = asyncio.create_task(self.probe(int(expert), session))

    async def probe(self, expert: int, session: aiohttp.ClientSession) -> None:
        """Asks for the expert's health. Any answer but an error of the server will do: not all servers have the path."""
        one, wait = self._experts[expert], aiohttp.ClientTimeout(total=PROBE_SECONDS)
        try:
            async with session.get(f"{one.url}/health", timeout=wait, headers=authorization(one)) as answer:
                well, reason = answer.status < 500, f"its health is {answer.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            well, reason = False, described(error)
        finally:
            self._probing.pop(expert, None)
        if well and not self.up[expert]:
            LOGGER.warning("expert %s is up", one.name)
            self.up[expert] = True
        elif not well:
            self.failed(expert, reason)
            self._next_probe[expert] = time.monotonic() + 1.0

    async def close(self) -> None:
        """Ends the probes."""
        tasks = list(self._probing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def authorization(expert: Expert) -> dict[str, str]:
    """The headers with the expert's key, if it has one."""
    return {} if expert.api_key is None else {"Authorization": f"Bearer {expert.api_key}"}


def described(error: BaseException) -> str:
    """An error of a connection, in a few words."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection ({error.os_error.strerror or type(error.os_error).__name__})"
    return str(error) or type(error).__name__
