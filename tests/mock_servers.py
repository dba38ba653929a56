"""Servers that answer like vLLM's, at once or slowly, and fail in every way on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

FAULTS = ("refuse", "500", "reset", "reset early", "hang", "hang early", "error event", "cut")


class MockServer:
    """A server of the model `mock`, which answers with the words `w0 w1 ...`, `max_tokens` of them."""

    def __init__(self, gap: float = 0.0):
        self.gap = gap  # s between tokens
        self.port = 0
        self.faults: dict[str, float] = {}  # way to fail -> its probability
        self.random = random.Random(0)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []  # case does not matter
        self.open = 0
        self.most_open = 0
        self.aborted = 0
        self.keep = True  # bodies and headers
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        silent = logging.getLogger("mock")  # a connection that is reset by a test is no error
        silent.disabled = True
        options: dict[str, Any] = {"access_log": None, "logger": silent, "handler_cancellation": True}
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, **options)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=4096).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Like a crash: connections are closed at once."""
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
        self._runner = None

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "mock", "max_model_len": 4096}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text='vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="801"} 1.0\n')

    def _fault(self) -> str | None:
        draw = self.random.random()
        for fault, probability in self.faults.items():
            draw -= probability
            if draw < 0:
                return fault
        return None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._stream(request)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        body, fault = await request.json(), self._fault()
        if self.keep:
            self.bodies.append(body)
            self.headers.append(request.headers.copy())
        if body.get("max_tokens", 1) > 100_000:
            error = {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        if fault == "500":
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        if fault == "reset early":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "hang early":
            await asyncio.sleep(3600)
        chat = request.path.endswith("chat/completions")
        count, prompt = body.get("max_tokens", 5), 7 if chat else len(str(body["prompt"]).split())
        head = {"id": "cmpl-1", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choices = [{"index": 0, "text": "whole", "finish_reason": "stop"}]
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
            return web.json_response({**head, "object": "text_completion", "choices": choices, "usage": usage})
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        options = body.get("stream_options") or {}

        def event(choices: list[Any], tokens: int, usage: bool) -> bytes:
            data = {**head, "choices": choices}
            if usage:
                data["usage"] = {
                    "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens
                }  # fmt: skip
            return b"data: " + json.dumps(data).encode() + b"\n\n"

        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)
        continuous = bool(options.get("continuous_usage_stats"))
        if chat:
            await stream.write(event([{"index": 0, "delta": {"role": "assistant", "content": ""}}], 0, continuous))
        broken_at = self.random.randrange(count) if fault else -1
        for number in range(count):
            if self.gap:
                await asyncio.sleep(self.gap)
            if number == broken_at:
                if fault == "reset":
                    assert request.transport is not None
                    request.transport.abort()
                    return stream
                if fault == "hang":
                    await asyncio.sleep(3600)
                if fault == "error event":
                    await stream.write(b'data: {"error": {"message": "broken", "type": "internal", "code": 500}}\n\n')
                if fault in ("error event", "cut"):
                    return stream
            text = f"{body.get('word', 'w')}{number} "
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if number == count - 1 else None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            await stream.write(event([choice], number + 1, continuous))
        if options.get("include_usage"):
            await stream.write(event([], count, True))
        await stream.write(b"data: [DONE]\n\n")
        return stream


async def _serve(port: int, gap: float) -> None:
    server = MockServer(gap)
    server.port = port
    await server.start()
    print(server.port, flush=True)
    await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def mock_servers(count: int, gap: float = 0.0) -> AsyncIterator[list[MockServer]]:
    """This many servers, each on a port of its own."""
    servers = [MockServer(gap) for _ in range(count)]
    try:
        for server in servers:
            await server.start()
        yield servers
    finally:
        for server in servers:
            await server.stop()


if __name__ == "__main__":  # a server as a process: its port, 0 for any, and the s between tokens
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
