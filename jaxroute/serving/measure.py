"""Measures the engine of a server that nothing else uses (`profile: auto`), by requests for it: some fifteen seconds.

Batches of several sizes and contexts decode together: an iteration of B requests takes c0 + c2 * B + c3 * context
(simulation.md section 2). Single prompts of several lengths p get their first token after one iteration, of
c0 + (c1 + c3) * p, and a constant for the way there. Non-negative least squares on relative errors gives all five. A
log of ordinary traffic, from which `jaxroute calibrate` estimates more options, determines the coefficients less well.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from scipy.optimize import nnls

from jaxroute.errors import UserError
from jaxroute.serving.cluster import Expert
from jaxroute.serving.health import authorization, described
from jaxroute.serving.openai import EventParser
from jaxroute.simulator.engine_config import DEFAULTS

BATCHES = ((1, 16), (4, 16), (16, 16), (32, 16), (64, 16), (4, 256), (4, 1000))
"""Requests that decode together, and words of their prompts."""

PROMPTS = (16, 200, 500, 1000, 1500)
"""Words of the prompts whose first token is timed."""

TOKENS, REPEATS = 32, 2


class Answer(NamedTuple):
    """A stream as it came; times in s."""

    prompt_tokens: int
    sent: float
    times: list[tuple[float, int]]  # when there were how many tokens


async def served_model(session: aiohttp.ClientSession, expert: Expert) -> tuple[str, int | None]:
    """The first model of a server, and its maximum length if it says so. Raises `UserError`."""
    try:
        async with session.get(f"{expert.url}/v1/models", headers=authorization(expert)) as answer:
            model = (await answer.json())["data"][0]
            return str(model["id"]), model.get("max_model_len")
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"/v1/models does not answer ({described(error)})") from None


async def measure_engine(session: aiohttp.ClientSession, expert: Expert, known: dict[str, Any]) -> dict[str, Any]:
    """The options of the engine, as `engine_from_config` takes them; `known` are kept. Raises `UserError`."""
    _, longest = await served_model(session, expert)
    told = await _cache(session, expert)
    engine = {**DEFAULTS, **told, **({} if longest is None else {"max_model_len": longest}), **known}
    most_words = min(engine["max_model_len"], engine["max_num_batched_tokens"]) // 2 - TOKENS
    most_held = engine["block_size"] * (engine["num_gpu_blocks"] - 1)
    together: list[list[list[Answer]]] = []
    for batch, words in BATCHES:
        held = batch * (2 * words + TOKENS)  # tokens, by a cautious estimate
        if batch <= engine["max_num_seqs"] and words <= most_words and held <= most_held:
            together.append(
                [
                    await asyncio.gather(*(_complete(session, expert, words, TOKENS) for _ in range(batch)))
                    for _ in range(REPEATS)
                ]
            )
    alone = [
        [await _complete(session, expert, words, 1) for _ in range(REPEATS)] for words in PROMPTS if words <= most_words
    ]
    return {**engine, "latency": fit_latency(together, alone)}


def fit_latency(together: Sequence[Sequence[Sequence[Answer]]], alone: Sequence[Sequence[Answer]]) -> list[float]:
    """c0 to c3 in s of the latency model, from repetitions of requests that were sent at once, and of requests that
    were alone. Of repetitions the fastest counts. Raises `UserError` if the answers do not determine them.
    """
    rows: list[list[float]] = []  # of c0, c1, c2, c3, the way there
    seconds: list[float] = []
    for tries in together:
        measured = [one for answers in tries if (one := _iteration(answers)) is not None]
        if measured:
            least, context = min(measured)
            rows.append([1, 0, len(tries[0]), context, 0])
            seconds.append(least)
    for tries in alone:
        tokens = tries[0].prompt_tokens
        rows.append([1, tokens, 0, tokens, 1])
        seconds.append(min(one.times[0][0] - one.sent for one in tries))
    matrix, target = np.array(rows).reshape(-1, 5), np.array(seconds)
    scales = np.maximum(np.abs(matrix).max(axis=0, initial=0), 1)
    if np.linalg.matrix_rank(matrix / scales, tol=1e-3) < matrix.shape[1]:
        raise UserError("it holds too few tokens or requests to be measured; give its profile")
    solution = nnls(matrix / scales / target[:, None], np.ones(len(target)))[0] / scales
    if solution[0] <= 0:
        raise UserError("it answers at once, so that it has no times to measure; give its profile")
    return [float(value) for value in solution[:4]]


def _iteration(answers: Sequence[Answer]) -> tuple[float, float] | None:
    """Mean seconds and context of an iteration in which all the requests decode; None if there are too few."""
    begin = max(answer.times[0][0] for answer in answers)
    times = [[(at, tokens) for at, tokens in answer.times if at >= begin] for answer in answers]
    end = min(own[-1][0] for own in times)
    spans = [[(at, tokens) for at, tokens in own if at <= end] for own in times]
    iterations = float(np.median([own[-1][1] - own[0][1] for own in spans]))
    if iterations < TOKENS / 4:
        return None
    # An iteration reads all tokens before the one that it makes: the first as many as own[0] says.
    context = sum(
        answer.prompt_tokens + (own[0][1] + own[-1][1] - 1) / 2 for answer, own in zip(answers, spans, strict=True)
    )
    return float(np.median([own[-1][0] - own[0][0] for own in spans])) / iterations, context


async def _cache(session: aiohttp.ClientSession, expert: Expert) -> dict[str, Any]:
    """What vLLM's metrics say of the KV cache."""
    try:
        async with session.get(f"{expert.url}/metrics", headers=authorization(expert)) as answer:
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return {}
    found = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="(\d+)"', found[1])) if found else {}
    return {key: int(labels[key]) for key in ("block_size", "num_gpu_blocks") if key in labels}


_PROMPTS = iter(range(1 << 62))


async def _complete(session: aiohttp.ClientSession, expert: Expert, words: int, tokens: int) -> Answer:
    """A completion of so many tokens, whatever the model would answer."""
    number = next(_PROMPTS)  # prompts with different beginnings share no cached blocks
    text = " ".join(f"w{(number * 131 + place * 7) % 3989 + tokens + 1}" for place in range(words))
    body = {
        "model": expert.model, "prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    parser, prompt, times, sent = EventParser(), 0, list[tuple[float, int]](), time.perf_counter()
    try:
        async with session.post(f"{expert.url}/v1/completions", json=body, headers=authorization(expert)) as answer:
            if answer.status != 200:
                raise UserError(f"it answers {answer.status} to a request that measures it")
            async for chunk in answer.content.iter_any():
                now = time.perf_counter()
                for data in parser.feed(chunk):
                    usage = None if data == b"[DONE]" else json.loads(data).get("usage")
                    if usage and usage["completion_tokens"] > (times[-1][1] if times else 0):
                        times.append((now, usage["completion_tokens"]))
                        prompt = usage["prompt_tokens"]
    except (aiohttp.ClientError, ValueError, LookupError) as error:
        raise UserError(f"a request that measures it failed ({described(error)})") from None
    if not times:
        raise UserError("its stream has no usage, which vLLM sends with continuous_usage_stats")
    return Answer(prompt, sent, times)
