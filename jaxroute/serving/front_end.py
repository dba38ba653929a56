"""The front end: OpenAI's API over HTTP, forwarded to the expert that the dispatcher chooses."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from jaxroute.serving.call import Call, Outcome
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.health import Health, authorization, described
from jaxroute.serving.measure import measure_engine, served_model
from jaxroute.serving.openai import (
    DONE,
    KINDS,
    Assembly,
    Completion,
    EventParser,
    Refused,
    client_event,
    error_event,
    parse_completion,
)
from jaxroute.serving.status import PAGE, status
from jaxroute.simulator.engine_config import engine_from_config

LOGGER = logging.getLogger("jaxroute.serving")

_NOT_FORWARDED = {
    "host", "authorization", "content-length", "content-type", "connection", "keep-alive", "transfer-encoding", "te",
    "trailer", "upgrade", "proxy-authorization", "proxy-authenticate", "accept-encoding", "expect", "x-jaxroute-limit",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the front end accepts."""

    body_bytes: int = 32 << 20
    header_bytes: int = 16 << 10  # of one header
    open_requests: int = 4096
    client_seconds: float = 30.0  # to send a request, and to take what is written
    connect_seconds: float = 5.0
    silent_seconds: float = 60.0  # an expert with open requests that sends nothing for so long has failed


class ExpertError(Exception):
    """An expert failed a request; the message says how."""


class ClientGoneError(Exception):
    """The client has gone, or takes nothing."""


@dataclass(eq=False)
class Watched:
    """A request at an expert, for the monitor."""

    call: Call
    clock: asyncio.Timeout
    writing_since: float | None = None
    error: Exception | None = None  # why the monitor has ended it

    def stop(self, error: Exception) -> None:
        """Ends the request from outside."""
        if self.error is None and not self.clock.expired():
            self.error = error
            self.clock.reschedule(asyncio.get_running_loop().time())


@dataclass
class Reply:
    """The answer to a client, which is a stream once it has begun."""

    request: web.Request
    asked: Completion
    stream: web.StreamResponse | None = None
    watched: Watched | None = field(default=None)

    async def write(self, data: bytes, headers: dict[str, str]) -> None:
        """Streams `data`. Raises `ClientGoneError`."""
        try:
            if self.watched is not None:
                self.watched.writing_since = time.monotonic()
            if self.stream is None:
                self.stream = web.StreamResponse(
                    headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", **headers}
                )
                await self.stream.prepare(self.request)
            await self.stream.write(data)
        except (ConnectionError, aiohttp.ClientConnectionError):
            raise ClientGoneError from None
        finally:
            if self.watched is not None:
                self.watched.writing_since = None

    async def refuse(self, refused: Refused, seconds: float) -> web.StreamResponse:
        """The last word about a request that failed: an answer, or an event if the stream has begun.

        Raises `ClientGoneError`, also if the client takes nothing for so long.
        """
        if self.stream is None:
            return refusal(refused)
        try:
            async with asyncio.timeout(seconds):
                await self.write(error_event(refused), {})
        except TimeoutError:
            raise ClientGoneError from None
        return self.stream


def refusal(refused: Refused) -> web.Response:
    """An error as an answer."""
    return web.json_response(refused.body(), status=refused.status, headers=refused.headers)


class FrontEnd:
    """Handlers of all paths, and the monitor that ends what hangs."""

    def __init__(self, dispatcher: Dispatcher, limits: Limits, api_key: str | None = None):
        """`api_key` guards everything but /, /status.json, /health and /metrics."""
        self.dispatcher, self.limits, self._api_key = dispatcher, limits, api_key
        self.health = Health(dispatcher.cluster.experts, dispatcher.up)
        self.draining = False
        self.stopping = asyncio.Event()  # set, it shuts the server down
        self._measuring = asyncio.Lock()
        self.open = 0  # requests for completions
        self._watched: set[Watched] = set()
        self._session: aiohttp.ClientSession | None = None
        self._monitor: asyncio.Task[None] | None = None
        self._active: dict[Any, float] = {}  # connection -> its last request, or when it was first seen
        self._busy: dict[Any, int] = {}  # connection -> requests in progress
        self.on_tick: list[Callable[[], None]] = []

    def application(self) -> web.Application:
        """The application, whose start opens the connections to the experts."""
        app = web.Application(middlewares=[self._guard], client_max_size=self.limits.body_bytes)
        for path in KINDS:
            app.router.add_post(path, self._completion)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/status.json", self._status)
        app.router.add_get("/", self._page)
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._stop)
        return app

    async def _start(self, app: web.Application) -> None:
        # vLLM closes idle connections after 5 s, so they are given up before.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
        wait = aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds)
        self._session = aiohttp.ClientSession(connector=connector, timeout=wait, auto_decompress=True)
        await self.health.start(self._session, self._learn)
        self._monitor = asyncio.create_task(self._watch())

    async def _learn(self, number: int) -> None:
        """Asks an expert for its model, and measures its engine, one after the other. Raises `UserError`."""
        assert self._session is not None
        expert = self.dispatcher.cluster.experts[number]
        async with self._measuring:
            if not expert.model:
                expert.model = (await served_model(self._session, expert))[0]
            if expert.measured_with is not None:
                LOGGER.warning("expert %s is being measured", expert.name)
                config = await measure_engine(self._session, expert, expert.measured_with)
                self.dispatcher.use_engine(number, engine_from_config(config, f"expert {expert.name}"))
                expert.measured_with = None
                shown = ", ".join(f"{value:.4g}" for value in config["latency"])
                LOGGER.warning("expert %s: latency [%s], %d KV blocks", expert.name, shown, config["num_gpu_blocks"])

    async def _stop(self, app: web.Application) -> None:
        assert self._monitor is not None and self._session is not None
        self._monitor.cancel()
        await asyncio.gather(self._monitor, return_exceptions=True)
        await self.health.close()
        await self._session.close()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Asks for the key, and turns every error into one of the API's."""
        connection = request.protocol
        self._busy[connection] = self._busy.get(connection, 0) + 1
        try:
            if self._api_key is not None and request.path.startswith(("/v1/", "/route", "/event")):
                given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), self._api_key.encode()):
                    raise Refused(401, "The API key is missing or wrong.", "authentication_error", "invalid_api_key")
            return await handler(request)
        except Refused as refused:
            return refusal(refused)
        except web.HTTPRequestEntityTooLarge:
            largest = self.limits.body_bytes >> 20
            return refusal(Refused(413, f"The body is larger than {largest} MB.", code="too_large", Connection="close"))
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return refusal(Refused(error.status, f"{request.method} {request.path}: {error.reason}."))
        except ClientGoneError:
            if request.transport is not None:
                request.transport.abort()  # what is written would not be taken
            return web.Response()
        except Exception:
            LOGGER.exception("an error in %s %s", request.method, request.path)
            return refusal(Refused(500, "The front end has an error; its log has more.", "server_error"))
        finally:
            self._active[connection] = time.monotonic()
            self._busy[connection] -= 1
            if not self._busy[connection]:
                del self._busy[connection]

    async def body(self, request: web.Request) -> bytes:
        """The body of a request. Raises `Refused`."""
        if (request.content_length or 0) > self.limits.body_bytes:
            raise web.HTTPRequestEntityTooLarge(self.limits.body_bytes, request.content_length or 0)
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                return await request.read()
        except TimeoutError:
            raise Refused(408, "The body came too slowly.", code="timeout", Connection="close") from None
        except (ConnectionError, aiohttp.ClientError):
            raise ClientGoneError from None
        except web.RequestPayloadError:
            raise Refused(400, "The body is damaged.", Connection="close") from None

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise Refused(503, "The front end is shutting down.", "server_error", "shutting_down", Connection="close")
        if self.open >= self.limits.open_requests:
            raise Refused(
                429, "Too many requests are open.", "rate_limit_error", "too_many_requests", **{"Retry-After": "1"}
            )
        self.open += 1
        try:
            data, model = await self.body(request), self.dispatcher.cluster.model
            asked = parse_completion(KINDS[request.path], data, model, request.headers)
            return await self._serve(Reply(request, asked))
        finally:
            self.open -= 1

    async def _serve(self, reply: Reply) -> web.StreamResponse:
        """Sends the request to an expert, and to a second one if the first fails before anything was streamed."""
        call, failed = self.dispatcher.call(reply.asked), None
        for final in (False, True):
            expert = self.dispatcher.begin(call, without=failed)
            outcome: Outcome = "cancelled"
            try:
                answer = await self._forward(call, reply)
                outcome = "completed" if answer.status == 200 else "refused"
                self.health.worked(expert)
                return answer
            except Refused as refused:
                outcome, last = "refused", refused
            except ExpertError as error:
                outcome, failed = "failed", expert
                self.health.failed(expert, str(error))
                name = self.dispatcher.cluster.experts[expert].name
                last = Refused(502, f"Expert {name} failed: {error}.", "server_error", "expert_failed")
                if reply.stream is None and not final:
                    continue
            finally:
                self.dispatcher.end(call, outcome)
            return await reply.refuse(last, self.limits.client_seconds)
        raise AssertionError

    async def _forward(self, call: Call, reply: Reply) -> web.StreamResponse:
        """The answer of the call's expert. Raises `ExpertError`, `Refused` and `ClientGoneError`."""
        assert self._session is not None
        expert, asked = self.dispatcher.cluster.experts[call.expert], reply.asked
        forwarded = {key: value for key, value in reply.request.headers.items() if key.lower() not in _NOT_FORWARDED}
        headers = {**forwarded, **authorization(expert), "Content-Type": "application/json"}
        url, body = expert.url + reply.request.path, asked.upstream_body(expert.model)
        watched = None
        try:
            async with asyncio.timeout(None) as clock:
                watched = reply.watched = Watched(call, clock)
                self._watched.add(watched)
                async with self._session.post(url, data=body, headers=headers) as upstream:
                    own = {"X-Jaxroute-Expert": expert.name}
                    if upstream.status >= 500:
                        raise ExpertError(f"it answered {upstream.status}")
                    if upstream.status != 200 or upstream.content_type != "text/event-stream":
                        return await self._whole(upstream, call, own)
                    return await self._stream(upstream, call, reply, own)
        except aiohttp.ClientError as error:
            raise ExpertError(described(error)) from None
        except TimeoutError:
            assert watched is not None and watched.error is not None
            raise watched.error from None
        finally:
            reply.watched = None
            if watched is not None:
                self._watched.discard(watched)

    async def _whole(self, upstream: aiohttp.ClientResponse, call: Call, headers: dict[str, str]) -> web.Response:
        """An answer that is no stream: an error about the request, or what cannot be streamed."""
        body = await upstream.read()
        if upstream.status == 200:
            try:
                usage = json.loads(body).get("usage") or {}
            except (ValueError, AttributeError):
                usage = {}
            self.dispatcher.progress(call, usage.get("completion_tokens") or 1, usage.get("prompt_tokens"))
        for name in ("Retry-After", "X-Request-Id"):
            if name in upstream.headers:
                headers[name] = upstream.headers[name]
        return web.Response(status=upstream.status, body=body, content_type=upstream.content_type, headers=headers)

    async def _stream(
        self, upstream: aiohttp.ClientResponse, call: Call, reply: Reply, headers: dict[str, str]
    ) -> web.StreamResponse:
        """Reads a stream to its end, and forwards it or, for a client that wants no stream, the whole of it."""
        asked, parser = reply.asked, EventParser()
        assembly = None if asked.streamed else Assembly(asked.kind)
        async for chunk in upstream.content.iter_any():
            out, done = [], False
            for data in parser.feed(chunk):
                if data == b"[DONE]":
                    done = True
                    break
                event = self._event(data, call)
                if assembly is not None:
                    assembly.add(event)
                elif (shown := client_event(event, data, asked)) is not None:
                    out.append(shown)
            if done and assembly is None:
                out.append(DONE)
            if out:
                await reply.write(b"".join(out), headers)
            if done:
                break
        else:
            raise ExpertError("its stream ended early")
        if assembly is not None:
            return web.Response(body=assembly.answer(), content_type="application/json", headers=headers)
        assert reply.stream is not None
        return reply.stream

    def _event(self, data: bytes, call: Call) -> dict[str, Any]:
        """An event of a stream, once its tokens are counted."""
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ExpertError("it sent an event that is no JSON object")
        if "error" in event:
            error = event["error"] if isinstance(event["error"], dict) else {"message": str(event["error"])}
            code, message = error.get("code"), str(error.get("message"))
            if isinstance(code, int) and 400 <= code < 500:
                raise Refused(code, message, str(error.get("type")))
            raise ExpertError(f"it sent an error, {message[:200]}")
        usage = event.get("usage")
        if usage:
            tokens, prompt = usage.get("completion_tokens") or 0, usage.get("prompt_tokens")
        else:  # a server without usage in each event: one token an event
            tokens, prompt = call.tokens + bool(event.get("choices")), None
        self.dispatcher.progress(call, tokens, prompt)
        return event

    async def _watch(self) -> None:
        """Ends what hangs: experts without a sign of life, clients that take nothing, connections without a request."""
        interval = min(1.0, self.limits.silent_seconds / 4, self.limits.client_seconds / 4)
        while True:
            await asyncio.sleep(interval)
            try:
                self._tick()
            except Exception:
                LOGGER.exception("an error in the monitor")

    def _tick(self) -> None:
        dispatcher, limits, now = self.dispatcher, self.limits, time.monotonic()
        silent = now - dispatcher.last_progress > limits.silent_seconds
        for expert in (silent & (dispatcher.ledger.count > 0)).nonzero()[0]:
            if any(one.call.ticket and one.call.expert == expert for one in self._watched):  # else a sidecar's
                self.health.failed(int(expert), f"it sent nothing for {limits.silent_seconds:g} s")
        for one in list(self._watched):
            if one.writing_since is not None and now - one.writing_since > limits.client_seconds:
                one.stop(ClientGoneError())
            elif one.call.ticket and silent[one.call.expert]:
                one.stop(ExpertError(f"it sent nothing for {limits.silent_seconds:g} s"))
        self._active = {connection: self._active.get(connection, now) for connection in self.connections()}
        for connection, since in self._active.items():
            if connection not in self._busy and now - since > limits.client_seconds:
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.close()
        for function in self.on_tick:
            function()

    def connections(self) -> list[Any]:
        """Connections of clients; the runner replaces this."""
        return []

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self.dispatcher.cluster.model, "object": "model", "created": 0, "owned_by": "jaxroute"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, request: web.Request) -> web.Response:
        if self.draining or not self.dispatcher.up.any():
            what = "shutting down" if self.draining else "no expert is up"
            return web.json_response({"status": what}, status=503)
        return web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        statistics = self.dispatcher.statistics
        statistics.set_state(self.dispatcher.ledger.count, self.dispatcher.up)
        return web.Response(body=generate_latest(statistics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(status(self.dispatcher, self.draining))

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")
