"""OpenAI's protocol as far as a front end must know it: requests, streamed events, answers and errors.

What the front end does not need to know passes through untouched.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxroute.workload.estimate import estimated_tokens

KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
"""Paths of the API that are routed."""

UNSTREAMED = ("prompt_logprobs", "use_beam_search", "best_of")
"""Options that vLLM refuses in a stream. A request with one of them is sent as it is, so its progress is unseen."""

DONE = b"data: [DONE]\n\n"

LIMIT_HEADER = "X-Jaxroute-Limit"


class Refused(Exception):
    """A request that ends with an error of the API. `status` is HTTP's; `headers` go with it."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.headers = status, message, kind, code, headers

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        return {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Limit:
    """A limit of latency: s per output token from arrival to end, or to the first token (TTFT) and per token (TPOT)."""

    per_token: float | None = None
    ttft: float | None = None
    tpot: float | None = None

    def of(self, tokens: float) -> float:
        """The limit in s per output token of an answer of `tokens`."""
        if self.per_token is not None:
            return self.per_token
        assert self.ttft is not None and self.tpot is not None
        return (self.ttft + self.tpot * max(tokens - 1, 0)) / max(tokens, 1)

    def is_met(self, first_token: float, finish: float, tokens: int) -> bool:
        """Whether an answer with these times since its arrival, s, met the limit."""
        if self.per_token is not None:
            return finish / max(tokens, 1) < self.per_token
        assert self.ttft is not None and self.tpot is not None
        return first_token < self.ttft and (tokens < 2 or (finish - first_token) / (tokens - 1) < self.tpot)


@dataclass(frozen=True)
class Completion:
    """A request for a completion."""

    kind: str  # chat or text
    body: dict[str, Any]  # as it came
    streamed: bool  # the client wants a stream
    wants_usage: bool  # and a last event with the usage
    wants_continuous_usage: bool  # and the usage in every event
    text: str  # of its prompt
    prompt_tokens: int | None  # if its prompt is given as tokens
    most_tokens: int | None  # of the answer
    limit: Limit | None

    @property
    def streams_upstream(self) -> bool:
        """Whether it can be asked for as a stream, by which its progress is seen."""
        return not any(self.body.get(key) for key in UNSTREAMED)

    @functools.cached_property
    def estimated_prompt_tokens(self) -> float:
        """The tokens of its text, as far as words and characters tell."""
        return estimated_tokens(self.text)[0]

    def upstream_body(self, model: str) -> bytes:
        """The body to send to a server that calls its model `model`."""
        body = {**self.body, "model": model}
        if self.streams_upstream:
            body["stream"] = True
            usage = {"include_usage": True, "continuous_usage_stats": True}
            body["stream_options"] = {**(self.body.get("stream_options") or {}), **usage}
        return _dumps(body)


def parse_completion(kind: str, data: bytes, model: str, headers: Mapping[str, str]) -> Completion:
    """A request of this kind from its body and headers. Raises `Refused`."""
    body = parse_object(data)
    asked = body.get("model", model)
    if asked != model:
        raise Refused(404, f"The model {asked!r} does not exist; use {model!r}.", code="model_not_found")
    return completion_of(kind, body, parse_limit(headers.get(LIMIT_HEADER)))


def completion_of(kind: str, body: dict[str, Any], limit: Limit | None) -> Completion:
    """A request of this kind from its parsed body. Raises `Refused`."""
    if kind == "chat":
        text, tokens = _messages_text(body.get("messages")), None
    else:
        text, tokens = _prompt_text(body.get("prompt"))
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object.")
    options = options or {}
    streamed = body.get("stream", False)
    if streamed not in (True, False, None):
        raise Refused(400, "stream must be true or false.")
    most = None
    for key in ("max_completion_tokens", "max_tokens"):
        most = body.get(key) if most is None else most
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise Refused(400, f"{key} must be a whole number of at least 1, not {shown(most)}.")
    return Completion(
        kind=kind,
        body=body,
        streamed=bool(streamed),
        wants_usage=bool(options.get("include_usage")),
        wants_continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        text=text,
        prompt_tokens=tokens,
        most_tokens=most,
        limit=limit,
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises `Refused`."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not text"
        raise Refused(400, f"The body is not JSON: {what}.") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    return body


def parse_limit(text: str | None) -> Limit | None:
    """The limit of a header: milliseconds a token, as in `30`, or `ttft=500, tpot=25`. Raises `Refused`."""
    if text is None:
        return None
    if "=" not in text:
        return Limit(per_token=_milliseconds(text, text))
    parts = dict(part.split("=", 1) for part in re.split(r"[,;\s]+", text.strip()) if "=" in part)
    if set(parts) != {"ttft", "tpot"}:
        raise Refused(400, f"{LIMIT_HEADER} must be like 30 or like ttft=500, tpot=25 (ms), not {shown(text)}.")
    return Limit(ttft=_milliseconds(parts["ttft"], text), tpot=_milliseconds(parts["tpot"], text))


def _milliseconds(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Refused(400, f"{LIMIT_HEADER} must be milliseconds above 0, not {shown(text)}.")
    return value / 1000


def shown(value: Any) -> str:
    """`value` for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _messages_text(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of one or more messages.")
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            raise Refused(400, "Each of messages must be an object.")
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):  # parts of text, images, audio
            texts = (part.get("text") for part in content if isinstance(part, dict))
            parts += [text for text in texts if isinstance(text, str)]
    return "\n\n".join(parts)


def _prompt_text(prompt: Any) -> tuple[str, int | None]:
    """Text and, if it is given as tokens, number of tokens of a prompt or a list of prompts."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return "\n\n".join(prompt), None
        if all(isinstance(part, int) for part in prompt):
            return "", len(prompt)
        if all(isinstance(part, list) for part in prompt):
            return "", sum(map(len, prompt))
    raise Refused(400, "prompt must be a text, a list of tokens, or a list of these.")


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class EventParser:
    """Splits a stream of bytes into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that are whole with this chunk."""
        rest = self._rest + chunk
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *blocks, self._rest = rest.split(b"\n\n")
        found = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                found.append(block[6:])
                continue
            lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:  # else a comment, which keeps the connection open
                found.append(b"\n".join(lines))
        return found


def client_event(event: dict[str, Any], data: bytes, asked: Completion) -> bytes | None:
    """What the client gets of a server's event, without the usage that it did not ask for; None: nothing."""
    if "usage" not in event or asked.wants_continuous_usage:
        return b"data: " + data + b"\n\n"
    if not event.get("choices"):
        return b"data: " + data + b"\n\n" if asked.wants_usage else None
    del event["usage"]
    if asked.wants_usage:
        event["usage"] = None
    return b"data: " + _dumps(event) + b"\n\n"


class Assembly:
    """A whole answer from the events of its stream."""

    def __init__(self, kind: str):
        self._kind = kind
        self._answer: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Takes the next event."""
        for key, value in event.items():
            if key not in ("choices", "object") and (value is not None or key not in self._answer):
                self._answer[key] = value
        for choice in event.get("choices") or ():
            whole = self._choices.setdefault(choice.get("index", 0), {})
            _merge(whole, choice)

    def answer(self) -> bytes:
        """The answer's body."""
        choices = []
        for _, choice in sorted(self._choices.items()):
            if self._kind == "chat":
                message: dict[str, Any] = {"role": "assistant", "content": None, **choice.pop("delta", {})}
                for call in message.get("tool_calls") or ():
                    call.pop("index", None)
                if not message["content"] and message.get("tool_calls"):
                    message["content"] = None
                choice = {"index": choice.pop("index", 0), "message": message, **choice}
            choices.append(choice)
        name = "chat.completion" if self._kind == "chat" else "text_completion"
        return _dumps({**self._answer, "object": name, "choices": choices})


_WHOLE = ("role", "id", "type", "finish_reason", "stop_reason", "index")
"""Texts of a stream that come whole, not in parts."""


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds a part of an object to what came before: texts and lists go on, and lists of objects go on by index."""
    for key, value in part.items():
        old = whole.get(key)
        if value is None and old is not None:
            continue
        if old is None or key in _WHOLE or type(old) is not type(value):
            whole[key] = value if not isinstance(value, list | dict) else _copied(value)
        elif isinstance(value, str):
            whole[key] = old + value
        elif isinstance(value, dict):
            _merge(old, value)
        elif isinstance(value, list):
            _extend(old, value)
        else:
            whole[key] = value


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        new: list[Any] = []
        _extend(new, value)
        return new
    new_object: dict[str, Any] = {}
    _merge(new_object, value)
    return new_object


def _extend(old: list[Any], new: list[Any]) -> None:
    for item in new:
        index = item.get("index") if isinstance(item, dict) else None
        same = [other for other in old if index is not None and isinstance(other, dict) and other.get("index") == index]
        if same:
            _merge(same[0], item)
        else:
            old.append(_copied(item) if isinstance(item, dict) else item)


def error_event(refused: Refused) -> bytes:
    """An error in a stream that has begun."""
    return b"data: " + _dumps(refused.body()) + b"\n\n"
