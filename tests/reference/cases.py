"""Random engines and workloads for property tests: every case fits one padded shape and is exact in float64.

All times are dyadic with few bits, so that a closed form and a sum over iterations agree bit for bit in float64, and
so that arrivals can fall exactly on iteration boundaries. `python -m tests.reference.cases [COUNT]` prints what they
contain, under each discipline.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.reference import caching
from tests.reference.engine import ENGINES, simulate

MAX_REQUESTS = 24
MAX_PROMPT = 96
MAX_OUTPUT = 48
MAX_ITERATIONS = 3000  # without full-prompt reservation two requests can preempt one another for ever

_TODAY = {"enable_prefix_caching": False, "async_scheduling": False, "threshold_when_alone": False}
_OLDER = {"enable_prefix_caching": True, "async_scheduling": True, "unhashed_first": False}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{engine: (engine, {}) for engine in ENGINES},
    "V1 caching": ("V1", {**_TODAY, "enable_prefix_caching": True}),
    "V1 async": ("V1", {**_TODAY, "async_scheduling": True}),
    "V1 caching, async": ("V1", {**_TODAY, "enable_prefix_caching": True, "async_scheduling": True}),
    "V1 of vLLM 0.19": ("V1", _OLDER),
}
"""Engines and options whose cases one program runs."""

GRID = 2.0**-8  # seconds: coarse latency and arrivals are multiples of it, so that they meet often


def _latency(rng: np.random.Generator) -> list[float]:
    """[c0, c1, c2, c3] or, with a knee, [c0, c1, c2, c3, knee tokens, c4]; seconds."""
    if rng.random() < 0.35:  # every duration is a multiple of the arrival grid
        latency = [GRID * int(rng.integers(1, 5)), GRID * int(rng.integers(0, 3)), GRID * int(rng.integers(0, 2)), 0.0]
        slope = GRID
    else:
        latency = [
            2.0**-9 * int(rng.integers(1, 8)),
            2.0**-16 * int(rng.integers(0, 32)),
            2.0**-16 * int(rng.integers(0, 16)),
            2.0**-24 * int(rng.integers(0, 64)),
        ]
        slope = 2.0**-14
    if rng.random() < 0.4:
        latency += [int(rng.choice([1, 2, 4, 8, 16, 32, 64])), slope * int(rng.integers(1, 4))]
    return latency


def _sizes(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request."""
    max_prompt = int(rng.choice([4, 16, 40, MAX_PROMPT]))
    max_output = int(rng.choice([3, 16, MAX_OUTPUT], p=[0.1, 0.2, 0.7]))
    if rng.random() < 0.15:  # identical requests move in lockstep and collide at the same instant
        return [(int(rng.integers(1, max_prompt + 1)), int(rng.integers(1, max_output + 1)))] * count
    prompts = rng.integers(1, max_prompt + 1, count)
    outputs = rng.integers(1, max_output + 1, count)
    return [(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]


def _config(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Options of an engine with memory, budget and length limits near what `sizes` need."""
    max_prompt = max(p for p, _ in sizes)
    longest = max(p + o for p, o in sizes)
    max_model_len = 8192
    if rng.random() < 0.25:  # vLLM's front end admits no prompt that leaves no room for a token
        max_model_len = int(rng.integers(max_prompt + 1, longest + 2))
        longest = min(longest, max_model_len)

    block_size = int(rng.choice([1, 2, 3, 4, 5, 8, 12, 16]))
    needed = -(-(longest - 1) // block_size)  # blocks of the largest request: its final token is never stored
    memory = rng.choice(["short", "exact", "tight", "medium", "ample"], p=[0.1, 0.12, 0.5, 0.18, 0.1])
    usable = {
        "short": max(needed - int(rng.integers(1, 3)), 1),
        "exact": needed,
        "tight": needed + int(rng.integers(0, needed + 2)),
        "medium": 3 * needed,
        "ample": 10_000,
    }[str(memory)]

    chunked = bool(rng.random() < 0.7)
    if chunked:
        budget = int(rng.integers(*[(1, 9), (8, 65), (64, 513), (2048, 2049)][rng.integers(4)]))
    else:  # a prompt, or a recompute, longer than the budget would stall
        budget = (
            int(rng.integers(longest, 4 * longest + 1)) if rng.random() < 0.85 else int(rng.integers(1, longest + 1))
        )
    return {
        "max_num_seqs": int(rng.choice([1, 2, 3, 4, 8, 16, 256], p=[0.04, 0.06, 0.1, 0.15, 0.25, 0.2, 0.2])),
        "max_num_batched_tokens": budget,
        "enable_chunked_prefill": chunked,
        "block_size": block_size,
        "num_gpu_blocks": usable + 1,
        "max_model_len": max_model_len,
        "reserve_full_isl": bool(rng.random() < 0.6),
        "long_prefill_token_threshold": int(rng.integers(1, 49)) if rng.random() < 0.3 else 0,
        "latency": _latency(rng),
        "max_iterations": MAX_ITERATIONS,
        "stall_iterations": int(rng.integers(1, 5)),
    }


def _config_v0(rng: np.random.Generator, config: dict[str, Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """`config` as V0's: what grows too large is ignored, so its limits on length and tokens are near the sizes."""
    longest = max(p + o for p, o in sizes)
    usable = config["num_gpu_blocks"] - 1
    model_len = int(rng.integers(2, longest + 2)) if rng.random() < 0.5 else longest
    unchecked = bool(rng.random() < 0.3)
    least = 1 if unchecked else max(model_len, config["max_num_seqs"])
    own = {key: config[key] for key in ("max_num_seqs", "block_size", "latency", "max_iterations", "stall_iterations")}
    return {
        **own,
        "max_num_batched_tokens": int(rng.integers(least, max(least, 3 * longest) + 1)),
        "num_gpu_blocks": max(usable, 2),
        "max_model_len": model_len,
        "watermark": float(rng.choice([0.01, 0.0, 0.125, 0.25], p=[0.4, 0.2, 0.2, 0.2])),
        "async_output_proc": bool(rng.random() < 0.6),
        "unchecked_budget": unchecked,
    }


def _config_orca(rng: np.random.Generator, config: dict[str, Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """`config` with memory for a few reservations; sometimes for none, so that the engine stalls."""
    max_prompt, longest = max(p for p, _ in sizes), max(p + o for p, o in sizes)
    model_len = int(rng.integers(max_prompt + 1, longest + 2))
    reserved = -(-model_len // config["block_size"])
    usable = int(rng.integers(max(reserved - 1, 1), reserved * int(rng.choice([2, 4, 16])) + 1))
    return {**config, "num_gpu_blocks": usable + 1, "max_model_len": model_len}


def _on_boundaries(
    rng: np.random.Generator, config: dict[str, Any], requests: list[dict[str, Any]], engine: str
) -> None:
    """Sets arrival times in groups, each group at the exact start or end of an iteration of the groups before it."""
    groups = np.array_split(np.arange(len(requests)), min(4, len(requests)))
    time = 0.0
    for done, group in enumerate(groups):
        if done:
            earlier = simulate({"engine": engine, "config": config, "requests": requests[: group[0]]})
            boundaries = [r["t"] for r in earlier["iterations"]] + [earlier["summary"]["end_time"]]
            later = [t for t in boundaries if t >= time][:40]
            time = float(rng.choice(later))
        for i in group:
            requests[i]["arrival_time"] = time


def random_case(rng: np.random.Generator, num_requests: int | None = None, engine: str = "V1") -> dict[str, Any]:
    """One spec {"engine", "config", "requests"} in the format of the schedule files, with every config key given.

    1..MAX_REQUESTS requests (or exactly `num_requests`) of at most MAX_PROMPT prompt and MAX_OUTPUT output tokens.
    Arrivals are not always sorted; `latency` has 4 or 6 entries; the engine may stall, or go on until
    `max_iterations`.
    """
    if num_requests is None:
        num_requests = int(rng.integers(1, MAX_REQUESTS + 1, 2).max())
    sizes = _sizes(rng, num_requests)
    config = _config(rng, sizes)
    if engine != "V1":
        config = (_config_v0 if engine == "V0" else _config_orca)(rng, config, sizes)
    requests: list[dict[str, Any]] = [{"prompt_len": p, "output_len": o} for p, o in sizes]
    kinds = ["at once", "bursts", "dense", "sparse", "boundaries", "iterations"]
    kind = str(rng.choice(kinds, p=[0.12, 0.2, 0.2, 0.1, 0.2, 0.18]))
    if kind == "boundaries":
        _on_boundaries(rng, config, requests, engine)
    elif kind == "iterations":
        arrivals = rng.integers(0, int(rng.choice([4, 60, 400])), num_requests)
        for request, arrival in zip(requests, arrivals, strict=True):
            request["arrival_iteration"] = int(arrival)
    else:
        ticks = {
            "at once": np.zeros(num_requests, int),
            "bursts": 64 * rng.integers(0, 4, num_requests),
            "dense": rng.integers(0, 64, num_requests),
            "sparse": rng.integers(0, 1024, num_requests),
        }[kind]
        if rng.random() < 0.7:
            ticks = np.sort(ticks)
        for request, tick in zip(requests, ticks, strict=True):
            request["arrival_time"] = GRID * int(tick)
    return {"engine": engine, "config": config, "requests": requests}


def _with_stop_tokens(rng: np.random.Generator, requests: list[dict[str, Any]]) -> None:
    for request in requests:
        if rng.random() < 0.4:
            request["max_tokens"] = request["output_len"] + int(rng.integers(0, 30))


def variant_case(rng: np.random.Generator, variant: str, num_requests: int | None = None) -> dict[str, Any]:
    """A `random_case` of a name of `VARIANTS`; with asynchronous scheduling, some requests end by a stop token."""
    engine, options = VARIANTS[variant]
    spec = random_case(rng, num_requests, engine)
    spec["config"] |= options
    if options.get("async_scheduling"):
        _with_stop_tokens(rng, spec["requests"])
    return spec


def _share(rng: np.random.Generator, requests: list[dict[str, Any]]) -> None:
    """Gives the prompts segments: shared beginnings, answers of earlier requests, repeated prompts, or nothing."""
    pool = [[identity, int(rng.integers(1, 49))] for identity in range(int(rng.integers(1, 4)))]
    before: list[list[list[int]]] = []  # the segments of each earlier request, prompt and output
    for index, request in enumerate(requests):
        kind = rng.choice(["pool", "turn", "repeat", "nothing"], p=[0.4, 0.3, 0.15, 0.15])
        beginning = [pool[int(rng.integers(len(pool)))]]
        if kind in ("turn", "repeat") and before:
            beginning = before[int(rng.integers(len(before)))]
            beginning = beginning[:-1] if kind == "repeat" else beginning
        if kind != "nothing":
            segments, left = [], request["prompt_len"]
            for identity, tokens in beginning:
                segments.append([identity, min(tokens, left)])
                left -= segments[-1][1]
            request["segments"] = [*segments, [1000 + index, left]]
        if rng.random() < 0.8:
            request["output_segment"] = int(rng.integers(50, 53)) if rng.random() < 0.2 else 2000 + index
        own = request.get("segments", [[3000 + index, request["prompt_len"]]])
        output = request.get("output_segment", 4000 + index)
        before.append([*own, [output, int(rng.integers(1, request["output_len"] + 1))]])


def sharing_case(rng: np.random.Generator) -> dict[str, Any]:
    """A `random_case` of V1 with prefix caching and prompts that share segments; some with asynchronous scheduling."""
    spec = random_case(rng)
    options = ("async_scheduling", "threshold_when_alone", "unhashed_first")
    spec["config"] |= {"enable_prefix_caching": True, **{option: bool(rng.random() < 0.5) for option in options}}
    _share(rng, spec["requests"])
    _with_stop_tokens(rng, spec["requests"])
    return spec


def prefix_case(rng: np.random.Generator, options: dict[str, Any], most_pieces: int) -> dict[str, Any]:
    """A case of V1 with prompts that share segments, which the engines in JAX simulate exactly: no content is ever in
    two blocks. No request has more than `most_pieces` pieces of others (`caching.prefixes`).
    """
    while True:
        spec = random_case(rng)
        spec["config"] |= {"enable_prefix_caching": True, "threshold_when_alone": True, **options}
        spec["config"]["long_prefill_token_threshold"] = 0  # with it, two requests may compute the same blocks at once
        _share(rng, spec["requests"])
        if options["async_scheduling"]:
            _with_stop_tokens(rng, spec["requests"])
        pieces = caching.prefixes(spec, np.arange(len(spec["requests"])))[0].shape[1]
        if pieces <= most_pieces and not caching.simulate(spec)["copies"]:
            return spec


def cases(variant: str) -> st.SearchStrategy[dict[str, Any]]:
    """Hypothesis strategy of `variant_case`; it shrinks towards fewer requests."""
    seeds, counts = st.integers(0, 2**32 - 1), st.integers(1, MAX_REQUESTS)
    return st.builds(lambda seed, count: variant_case(np.random.default_rng(seed), variant, count), seeds, counts)


def _traits(spec: dict[str, Any], result: dict[str, Any]) -> list[str]:
    config, requests, records = spec["config"], spec["requests"], result["iterations"]
    prompts = [r["prompt_len"] for r in requests]
    by_time = "arrival_time" in requests[0]
    arrivals = [r["arrival_time"] if by_time else r["arrival_iteration"] for r in requests]
    busy_starts = {b["t"] for a, b in zip(records, records[1:], strict=False) if a["t"] + a["dur"] == b["t"]}
    traits = {
        f"status {result['status']}": True,
        "preemption": result["summary"]["preemptions"] > 0,
        "5 preemptions or more": result["summary"]["preemptions"] >= 5,
        "several preempted in one iteration": any(len(r["preempted"]) > 1 for r in records),
        "chunked prefill": any(
            n < prompts[int(i)] for r in records for i, n in r["sched"].items() if r["np"] and n > 1
        ),
        "chunking off": not config.get("enable_chunked_prefill", True),
        "full-prompt reservation off": not config.get("reserve_full_isl", True),
        "long-prefill threshold": config.get("long_prefill_token_threshold", 0) > 0,
        "ignored": result["summary"].get("ignored", 0) > 0,
        "ignored after growing": any(r["emitted"] and r.get("ignored_iter") for r in result["per_request"].values()),
        "asynchronous output": config.get("async_output_proc", False),
        "preempted itself, nobody scheduled": any(r["preempted"] and not r["sched"] for r in records),
        "victim that had finished": any(
            set(r["finished"]) - set(r["sched"]) and r["nd"] and r["preempted"] for r in records
        ),
        "finished, not decoded once more": any(
            set(r["finished"]) - set(r["sched"]) and not r["np"] and not r["preempted"] for r in records
        ),
        "cut by max_model_len": any(r["prompt_len"] + r["output_len"] > config["max_model_len"] for r in requests),
        "latency knee": len(config["latency"]) == 6,
        "simultaneous arrivals": len(set(arrivals)) < len(arrivals),
        "arrival on a boundary of a busy engine": by_time and any(a in busy_starts for a in arrivals),
        "idle gap": by_time and any(a["t"] + a["dur"] < b["t"] for a, b in zip(records, records[1:], strict=False)),
        "arrival_iteration": not by_time,
        "empty iterations, then more": any(
            not a["sched"] and b["sched"] for a, b in zip(records, records[1:], strict=False)
        ),
        "waiting behind full seats": any(r["waiting"] and r["running"] == config["max_num_seqs"] for r in records),
    }
    return [name for name, present in traits.items() if present]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for engine in ENGINES:
        rng = np.random.default_rng(0)
        counter, iterations, requests = Counter(), 0, 0
        for _ in range(count):
            spec = random_case(rng, engine=engine)
            result = simulate(spec)
            counter.update(_traits(spec, result))
            iterations += result["summary"]["iterations"]
            requests += len(spec["requests"])
        print(
            f"{engine}: {count} cases, on average {requests / count:.1f} requests and {iterations / count:.0f} "
            "iterations; share with"
        )
        for name, times in counter.most_common():
            print(f"{100 * times / count:5.1f} %  {name}")


if __name__ == "__main__":
    main()
