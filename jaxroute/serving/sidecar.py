"""The sidecar: gateways in other languages ask for an expert (`POST /route`) and tell of progress (`POST /event`).

They forward requests themselves. A request of which nothing is heard for `EXPIRY` seconds has failed.
"""

from typing import Any
from uuid import uuid4

import numpy as np
from aiohttp import web

from jaxroute.serving.call import Call, Outcome
from jaxroute.serving.front_end import FrontEnd
from jaxroute.serving.openai import Completion, Limit, Refused, parse_limit, parse_object, shown

EXPIRY = 600.0

_ENDS: tuple[Outcome, ...] = ("completed", "failed", "cancelled", "refused")


class Sidecar:
    """Requests that gateways forward, by id."""

    def __init__(self, front_end: FrontEnd):
        """Its requests count in the ledger of `front_end`."""
        self._front_end, self._calls = front_end, dict[str, tuple[Call, float]]()
        front_end.on_tick.append(self._expire)

    def add_to(self, app: web.Application) -> None:
        """Adds the two paths."""
        app.router.add_post("/route", self._route)
        app.router.add_post("/event", self._event)

    async def _route(self, request: web.Request) -> web.Response:
        front_end, dispatcher = self._front_end, self._front_end.dispatcher
        body = parse_object(await front_end.body(request))
        if front_end.draining:
            raise Refused(503, "The front end is shutting down.", "server_error", "shutting_down")
        call = dispatcher.call(_facts(body))
        for key, values, kind in (
            ("predicted_scores", call.predicted_scores, float),
            ("predicted_tokens", call.predicted_lengths, int),
        ):
            if key in body:
                _predicted(key, body[key], values, kind, [expert.name for expert in dispatcher.cluster.experts])
        try:
            expert = dispatcher.cluster.experts[dispatcher.begin(call)]
        except Refused as refused:
            if refused.code not in ("dropped", "no_expert"):
                raise
            after = int(refused.headers["Retry-After"])
            return web.json_response({"expert": None, "reason": refused.message, "retry_after": after})
        identity = uuid4().hex
        self._calls[identity] = call, dispatcher.clock()
        return web.json_response({"id": identity, "expert": expert.name, "url": expert.url, "model": expert.model})

    async def _event(self, request: web.Request) -> web.Response:
        dispatcher = self._front_end.dispatcher
        body = parse_object(await self._front_end.body(request))
        identity, end = body.get("id"), body.get("end")
        if not isinstance(identity, str) or identity not in self._calls:
            raise Refused(404, f"No request {shown(identity)} is open.", code="unknown_request")
        if end is not None and end not in _ENDS:
            raise Refused(400, f"end must be one of {', '.join(_ENDS)}, not {shown(end)}.")
        call, _ = self._calls[identity]
        tokens = _count(body, "tokens", 0)
        dispatcher.progress(call, call.tokens if tokens is None else tokens, _count(body, "prompt_tokens", 1))
        if end is None:
            self._calls[identity] = call, dispatcher.clock()
        else:
            del self._calls[identity]
            dispatcher.end(call, end)
        return web.json_response({"id": identity, "tokens": call.tokens})

    def _expire(self) -> None:
        dispatcher = self._front_end.dispatcher
        for identity, (call, heard) in list(self._calls.items()):
            if dispatcher.clock() - heard > EXPIRY:
                del self._calls[identity]
                dispatcher.end(call, "failed")


def _facts(body: dict[str, Any]) -> Completion:
    """The facts of a request. Raises `Refused`."""
    text, limit = body.get("text", ""), body.get("limit")
    if not isinstance(text, str):
        raise Refused(400, f"text must be the text of the prompt, not {shown(text)}.")
    tokens = _count(body, "prompt_tokens", 1)
    if tokens is None and not text:
        raise Refused(400, "Give the text of the prompt, or prompt_tokens.")
    if limit is not None and not isinstance(limit, str | int | float):
        raise Refused(400, f"limit must be milliseconds a token, or ttft=500, tpot=25, not {shown(limit)}.")
    parsed: Limit | None = None if limit is None else parse_limit(str(limit))
    return Completion("text", {}, True, False, False, text, tokens, _count(body, "max_tokens", 1), parsed)


def _count(body: dict[str, Any], key: str, least: int) -> int | None:
    value = body.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**30):
        raise Refused(400, f"{key} must be a whole number of at least {least}, not {shown(value)}.")
    return value


def _predicted(key: str, given: Any, values: np.ndarray, kind: type, names: list[str]) -> None:
    """Writes the predictions that a gateway gives by expert's name into `values` [N]."""
    if not isinstance(given, dict):
        raise Refused(400, f"{key} must be an object with a number for each expert.")
    for name, value in given.items():
        if name not in names:
            raise Refused(400, f"{key}: there is no expert {shown(name)}; the experts are {', '.join(names)}.")
        valid = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 2**30
        if not valid or (kind is int and value < 1):
            raise Refused(400, f"{key}: {shown(value)} is not a prediction for {name}.")
        values[names.index(name)] = kind(value)
