"""The Mooncake conversation trace on one engine with three sizes of prefix cache: `replay` == the plain reference.

    python -m tests.mooncake TRACE [PROFILE]

TRACE is conversation_trace.jsonl of Mooncake's FAST'25 release, whose hash_ids are used as they are; PROFILE is of an
engine that can hold its longest request (default: roofline:h100:llama-3.1-8b). For each size it prints the share of
prompt tokens that the cache saved, TTFT and throughput, and how many requests' times differ between both, in float64.
The reference keeps every token and iteration: it takes 12 GB of memory, and a quarter of an hour for each size.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxroute.simulator.catalogue import load_profile
from jaxroute.simulator.presets import PRESETS, in_place_of, seats_and_budget
from jaxroute.simulator.replay import load_spec, replay
from tests.reference import caching

VERSION, BLOCKS = "vllm-0.33", (10_001, 30_001, 100_001)


def main(trace: str, profile: str = "roofline:h100:llama-3.1-8b") -> int:
    jax.config.update("jax_enable_x64", True)
    spec = load_spec(Path(trace), spread_ticks=True)
    config = in_place_of(load_profile(profile)["engine"], VERSION)
    gpu = profile.split(":")[1] if profile.startswith("roofline:") else None
    config = {**PRESETS[VERSION].switches, **config, **seats_and_budget(PRESETS[VERSION], gpu)}
    prompts = np.asarray([request["prompt_len"] for request in spec["requests"]])
    arrivals = np.asarray([request["arrival_time"] for request in spec["requests"]])
    tokens = sum(request["output_len"] for request in spec["requests"])
    failed = 0
    for blocks in BLOCKS:
        own: dict[str, Any] = {"config": {**config, "num_gpu_blocks": blocks}, "requests": spec["requests"]}
        start = time.monotonic()
        got = replay(own)
        between = time.monotonic()
        wanted = caching.simulate(own)
        seconds = between - start, time.monotonic() - between
        rows = [
            [
                (request["first_token_time"], request["finish_time"], request["preemptions"], request[cached])
                for request in result["per_request"].values()
            ]
            for result, cached in ((got, "cached_tokens"), (wanted, "cached_total"))
        ]
        del wanted  # gigabytes
        differ = sum(one != other for one, other in zip(*rows, strict=True))
        failed += differ > 0 or got["status"] != "ok"
        ttft = np.asarray([row[0] for row in rows[0]]) - arrivals
        end, hits = got["summary"]["end_time"], got["summary"]["cached_tokens"] / prompts.sum()
        print(
            f"{(blocks - 1) * 16:,} tokens of cache: {hits:.1%} of prompt tokens found, TTFT {ttft.mean():.3g} s on "
            f"average, {np.quantile(ttft, 0.5):.3g} s at the median and {np.quantile(ttft, 0.99):.3g} s at p99, "
            f"{(prompts.sum() + tokens) / end:,.0f} tokens/s, {got['summary']['preemptions']} preemptions; {differ} of "
            f"{len(prompts):,} requests differ from the reference; {seconds[0]:.0f} s and {seconds[1]:.0f} s",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
