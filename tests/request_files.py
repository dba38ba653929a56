"""A small valid file of each format of recorded requests, from the same requests, and what must be read from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

START = 1_700_000_000
"""Seconds since 1970 of the first request, in formats with a clock."""


class Request(NamedTuple):
    """Times in ms since the first request, lengths in tokens."""

    time: int
    prompt: int
    output: int
    ttft: int
    gap: int  # between tokens


REQUESTS = [Request(400 * i + 37 * (i % 3), 20 + 7 * i, 2 + i % 5, 30 + i, 12) for i in range(24)]

Row = dict[str, Any]
"""A request in the file's own names; of nested objects, the names are joined by dots."""


@dataclass(frozen=True)
class Example:
    """How a format writes requests. `time`, `prompt`, `output` are its names of the cells that every reader needs."""

    name: str  # as `jaxroute.workload.formats` has it
    kind: str  # csv, jsonl, or document
    row: Callable[[int, Request], Row]
    time: str
    prompt: str
    output: str
    tokens: tuple[str, ...] = ()  # cells with times of tokens
    identity: str | None = None
    ordered: bool = True
    scalable: bool = True  # times are plain numbers
    failed: bool = False  # a row without output tokens is left out
    wrap: Callable[[list[Any]], Any] = lambda rows: rows  # of a document

    def rows(self, requests: list[Request] = REQUESTS) -> list[Row]:
        """The rows of these requests."""
        return [self.row(index, request) for index, request in enumerate(requests)]

    def text(self, rows: list[Row]) -> str:
        """The file with these rows."""
        if self.kind == "csv":
            head = list(rows[0])
            lines = [",".join(head), *(",".join(str(row[key]) for key in head) for row in rows)]
            return "\n".join(lines) + "\n"
        if self.kind == "jsonl":
            return "".join(json.dumps(nested(row)) + "\n" for row in rows)
        return json.dumps(self.wrap([nested(row) for row in rows]))


def nested(row: Row) -> dict[str, Any]:
    """`row` with the dots of its names as levels."""
    tree: dict[str, Any] = {}
    for key, value in row.items():
        *above, last = key.split(".")
        inside = tree
        for name in above:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return tree


def _date(ms: int, form: str) -> str:
    moment = datetime(2023, 11, 16, 18, 15, 46, 680590) + timedelta(milliseconds=ms)
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f") + form


def _last(request: Request) -> float:
    return (request.time + request.ttft + request.gap * (request.output - 1)) / 1000


def _lists(rows: list[Any]) -> dict[str, Any]:
    keys = {key for row in rows for key in row}
    columns = {key: [row[key] for row in rows if key in row] for key in keys}
    return {"backend": "vllm", "request_rate": 2.5, "max_concurrency": None, **columns, "mean_ttft_ms": 41.5}


def _guidellm(i: int, r: Request) -> Row:
    first, last = START + (r.time + r.ttft) / 1000, START + _last(r)
    return {
        "request_id": f"chat-{i}",
        "prompt_tokens": r.prompt,
        "output_tokens": r.output,
        "info.timings.request_start": START + r.time / 1000,
        "info.timings.first_token_iteration": first,
        "info.timings.last_token_iteration": last,
    }


def _aiperf(i: int, r: Request) -> Row:
    return {
        "metadata.x_request_id": f"c087da26-{i}",
        "metadata.request_start_ns": START * 10**9 + r.time * 10**6,
        "metadata.benchmark_phase": "profiling",
        "metrics.time_to_first_token": {"value": float(r.ttft), "unit": "ms"},
        "metrics.request_latency": {"value": float(r.ttft + r.gap * (r.output - 1)), "unit": "ms"},
        "metrics.input_sequence_length.value": r.prompt,
        "metrics.output_sequence_length.value": r.output,
        "error": None,
    }


def _guidellm_report(rows: list[Any]) -> dict[str, Any]:
    failed = [{"request_id": "chat-x", "output_tokens": None}]
    return {"benchmarks": [{"requests": {"successful": rows, "errored": failed, "incomplete": []}}]}


EXAMPLES = [
    Example(
        "jaxroute",
        "csv",
        lambda i, r: {
            "arrival_time": r.time / 1000,
            "prompt_len": r.prompt,
            "output_len": r.output,
            "first_token_time": (r.time + r.ttft) / 1000,
            "finish_time": _last(r),
        },
        "arrival_time",
        "prompt_len",
        "output_len",
        ("first_token_time", "finish_time"),
    ),
    Example(
        "recorded server",
        "jsonl",
        lambda i, r: {
            "request_id": i,
            "arrival_s": r.time / 1000,
            "queued_s": r.time / 1000,
            "prompt_tokens": r.prompt,
            "output_tokens": r.output,
            "first_token_s": (r.time + r.ttft) / 1000,
            "last_token_s": _last(r),
        },
        "arrival_s",
        "prompt_tokens",
        "output_tokens",
        ("first_token_s", "last_token_s"),
        "request_id",
    ),
    Example(
        "Azure LLM",
        "csv",
        lambda i, r: {"TIMESTAMP": _date(r.time, "0"), "ContextTokens": r.prompt, "GeneratedTokens": r.output},
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        scalable=False,
    ),
    Example(
        "Azure LLM",
        "csv",
        lambda i, r: {"TIMESTAMP": _date(r.time, "+00:00"), "ContextTokens": r.prompt, "GeneratedTokens": r.output},
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        scalable=False,
    ),
    Example(
        "Mooncake",
        "jsonl",
        lambda i, r: {
            "timestamp": r.time,
            "input_length": r.prompt,
            "output_length": r.output,
            "hash_ids": list(range(i, i + -(-r.prompt // 512))),
        },
        "timestamp",
        "input_length",
        "output_length",
    ),
    Example(
        "BurstGPT",
        "csv",
        lambda i, r: {
            "Timestamp": r.time / 1000,
            "Model": "ChatGPT",
            "Request tokens": r.prompt,
            "Response tokens": r.output,
            "Total tokens": r.prompt + r.output,
            "Log Type": "Conversation log",
        },
        "Timestamp",
        "Request tokens",
        "Response tokens",
        failed=True,
    ),
    Example(
        "ServeGen",
        "csv",
        lambda i, r: {"request_id": i, "timestamp": r.time / 1000, "input_tokens": r.prompt, "output_tokens": r.output},
        "timestamp",
        "input_tokens",
        "output_tokens",
        identity="request_id",
    ),
    Example(
        "vidur",
        "csv",
        lambda i, r: {"arrived_at": r.time / 1000, "num_prefill_tokens": r.prompt, "num_decode_tokens": r.output},
        "arrived_at",
        "num_prefill_tokens",
        "num_decode_tokens",
    ),
    Example(
        "jaxroute serve",
        "jsonl",
        lambda i, r: {
            "request_id": f"1f-{i}",
            "sent_time": START + r.time / 1000,
            "first_token_time": START + (r.time + r.ttft) / 1000,
            "finish_time": START + _last(r),
            "prompt_tokens": r.prompt,
            "completion_tokens": r.output,
            "outcome": "completed",
        },
        "sent_time",
        "prompt_tokens",
        "completion_tokens",
        ("first_token_time", "finish_time"),
        "request_id",
        ordered=False,
        failed=True,
    ),
    Example(
        "LLMServingSim",
        "jsonl",
        lambda i, r: {
            "request_id": f"bench-{i}",
            "input_toks": r.prompt,
            "output_toks": r.output,
            "arrival_time": START + r.time / 1000,
            "queued_ts": 27536.5 + r.time / 1000,
            "scheduled_ts": 27536.5 + r.time / 1000,
            "first_token_ts": 27536.5 + (r.time + r.ttft) / 1000,
            "last_token_ts": 27536.5 + _last(r),
        },
        "arrival_time",
        "input_toks",
        "output_toks",
        ("first_token_ts", "last_token_ts"),
        "request_id",
        ordered=False,
    ),
    Example(
        "LLMServingSim workload",
        "jsonl",
        lambda i, r: {"input_toks": r.prompt, "output_toks": r.output, "arrival_time_ns": r.time * 10**6},
        "arrival_time_ns",
        "input_toks",
        "output_toks",
    ),
    Example(
        "vLLM benchmark",
        "document",
        lambda i, r: {
            "input_lens": r.prompt,
            "output_lens": r.output,
            "start_times": 51.25 + r.time / 1000,
            "ttfts": r.ttft / 1000,
            "itls": [r.gap / 1000] * (r.output - 1),
            "errors": "",
        },
        "start_times",
        "input_lens",
        "output_lens",
        ("ttfts",),
        ordered=False,
        failed=True,
        wrap=_lists,
    ),
    Example(
        "guidellm",
        "document",
        _guidellm,
        "info.timings.request_start",
        "prompt_tokens",
        "output_tokens",
        ("info.timings.first_token_iteration",),
        "request_id",
        ordered=False,
        failed=True,
        wrap=_guidellm_report,
    ),
    Example(
        "aiperf",
        "jsonl",
        _aiperf,
        "metadata.request_start_ns",
        "metrics.input_sequence_length.value",
        "metrics.output_sequence_length.value",
        (),
        "metadata.x_request_id",
        ordered=False,
    ),
]
"""All formats; both forms of Azure's dates."""

TIMED = ("jaxroute", "recorded server", "jaxroute serve", "LLMServingSim", "vLLM benchmark", "guidellm", "aiperf")
"""Names of the formats with times of tokens."""
