"""Clients that send, read, leave and check; servers that fail at random. Used by a test and by a benchmark."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import aiohttp

from tests.mock_servers import MockServer

FAULTS = {
    "500": 0.02,
    "reset": 0.02,
    "reset early": 0.02,
    "hang": 0.01,
    "hang early": 0.01,
    "error event": 0.02,
    "cut": 0.02,
}
"""Probabilities of the ways in which a server fails a request; about one in eight fails."""

LEAVES = 0.1
"""Share of clients that leave before the end."""


async def one_client(session: aiohttp.ClientSession, number: int, rng: random.Random) -> str:
    """Sends a request and returns how it ended. Raises `AssertionError` for an end that no request may have."""
    count, streamed = rng.randint(1, 12), rng.random() < 0.6
    chat = rng.random() < 0.5
    body = {"max_tokens": count, "stream": streamed, "user": str(number)}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    leaves = rng.uniform(0, 0.1) if rng.random() < LEAVES else None
    try:
        async with asyncio.timeout(leaves):
            async with session.post(path, json=body) as answer:
                data = await answer.read()
    except TimeoutError:
        return "left"
    if answer.status != 200:
        error = json.loads(data)["error"]
        assert answer.status in (429, 502, 503), (answer.status, error)
        assert answer.status != 429 or int(answer.headers["Retry-After"]) >= 1
        return str(error["code"])
    wanted = "".join(f"w{place} " for place in range(count))
    if not streamed:
        choice = json.loads(data)["choices"][0]
        assert (choice["message"]["content"] if chat else choice["text"]) == wanted
        return "whole"
    events = [part.removeprefix("data: ") for part in data.decode().split("\n\n") if part]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    text = ""
    for event in parsed:
        if "error" not in event:
            choice = event["choices"][0]
            text += choice["delta"]["content"] if chat else choice["text"]
    if events[-1] == "[DONE]":
        assert text == wanted and events.count("[DONE]") == 1 and not any("error" in event for event in parsed)
        return "streamed"
    assert "error" in parsed[-1] and wanted.startswith(text) and "[DONE]" not in events
    assert sum("error" in event for event in parsed) == 1
    return "broken"


async def chaos(
    address: str, requests: int, at_once: int, servers: list[MockServer], kill_every: float = 0
) -> Counter[str]:
    """How many requests ended in each way. With `kill_every`, in s, a server crashes that often and comes back."""
    rng, ends = random.Random(1), Counter[str]()
    for number, server in enumerate(servers):
        server.faults, server.keep = FAULTS, False
        server.random.seed(number)
    numbers = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            ends[await one_client(session, number, rng)] += 1

    async def killer() -> None:
        while kill_every:
            await asyncio.sleep(kill_every)
            server = rng.choice(servers)
            await server.stop()
            await asyncio.sleep(kill_every / 2)
            await server.start()

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as session:
        killing = asyncio.create_task(killer())
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client(session))
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
    return ends
