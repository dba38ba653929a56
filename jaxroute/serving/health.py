"""Which experts are up: one that fails leaves the action mask, and is asked for its health until it is back."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np

from jaxroute.errors import UserError
from jaxroute.serving.cluster import Expert

LOGGER = logging.getLogger("jaxroute.serving")

PROBE_SECONDS = 1.0
"""Time between questions for the health of an expert that is down; and the longest time that its answer may take."""

FIRST_WAIT, LONGEST_WAIT = 0.05, 30.0
"""s before the first question. The wait doubles with each failure since the last request that completed, so that a
server that is well but for its answers does not come back at once again and again."""


class Health:
    """Keeps `up`, bool [N], which others read."""

    def __init__(self, experts: tuple[Expert, ...], up: np.ndarray):
        self._experts, self.up = experts, up
        self._failures = np.zeros(len(experts), int)  # since the last request that completed
        self._session: aiohttp.ClientSession | None = None
        self._prepare: Callable[[int], Awaitable[None]] | None = None
        self._probes: dict[int, asyncio.Task[None]] = {}

    async def start(self, session: aiohttp.ClientSession, prepare: Callable[[int], Awaitable[None]]) -> None:
        """Asks all experts; those that do not answer are down, and are asked again.

        An expert that is not known yet is down until it is up and `prepare`, given its number, has returned. An
        exception of it is logged, and it is called again.
        """
        self._session, self._prepare = session, prepare
        for expert, reason in enumerate(await asyncio.gather(*map(self._ask, range(len(self._experts))))):
            if reason is not None or not self._experts[expert].known:
                self.failed(expert, reason or "it is not known yet")

    def failed(self, expert: int, reason: str) -> None:
        """Takes the expert out, for the reason that the log has, until it answers again."""
        if expert in self._probes:
            return
        LOGGER.warning("expert %s is down: %s", self._experts[expert].name, reason)
        self.up[expert] = False
        wait = min(FIRST_WAIT * 2.0 ** min(int(self._failures[expert]), 20), LONGEST_WAIT)
        self._failures[expert] += 1
        self._probes[expert] = asyncio.create_task(self._probe(expert, wait))

    def worked(self, expert: int) -> None:
        """A request has completed there."""
        self._failures[expert] = 0

    async def _probe(self, expert: int, wait: float) -> None:
        await asyncio.sleep(wait)
        while await self._ask(expert) is not None or not await self._is_prepared(expert):
            await asyncio.sleep(PROBE_SECONDS)
        LOGGER.warning("expert %s is up", self._experts[expert].name)
        self.up[expert] = True
        del self._probes[expert]

    async def _is_prepared(self, expert: int) -> bool:
        assert self._prepare is not None
        try:
            if not self._experts[expert].known:
                await self._prepare(expert)
        except UserError as error:
            LOGGER.warning("expert %s is not known: %s", self._experts[expert].name, error)
            await asyncio.sleep(10 * PROBE_SECONDS)
        return self._experts[expert].known

    async def _ask(self, expert: int) -> str | None:
        """Why the expert is not well. Any answer but an error of the server will do: not all have the path."""
        assert self._session is not None
        one, most = self._experts[expert], aiohttp.ClientTimeout(total=PROBE_SECONDS)
        try:
            async with self._session.get(f"{one.url}/health", timeout=most, headers=authorization(one)) as answer:
                return None if answer.status < 500 else f"its health is {answer.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return described(error)

    async def close(self) -> None:
        """Ends the probes."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)


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
