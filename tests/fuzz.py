"""jump == per-iteration == plain Python reference on random engines and workloads (`make fuzz CASES=n`), under every
discipline, and V1 also with the options that vLLM has on by default, without shared prefixes and with them. If content
may be in two blocks, it is `replay` that equals the reference.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import numpy as np

from jaxroute.simulator.replay import replay
from tests.reference import caching, engine
from tests.reference.cases import MAX_ITERATIONS, MAX_REQUESTS, VARIANTS, prefix_case, sharing_case, variant_case
from tests.replaying import Batch

CHUNK = 100
PIECES, RUNS = 10, 32
"""Size of the prefix cache of the cases in `PREFIXES`."""

PREFIXES = {
    "V1 prefixes": {"async_scheduling": False},
    "V1 prefixes, async": {"async_scheduling": True},
    "V1 prefixes of vLLM 0.19": {"async_scheduling": True, "unhashed_first": False},
}
"""Names of the cases of engines in JAX with prompts that share segments, and their options."""

SHARING = "V1 sharing prefixes"
"""Name of the cases of `replay` with prompts that share segments."""

SUMMARY = ("iterations", "preemptions", "end_time", "cached_tokens")
FIELDS = ("first_token_time", "finish_time", "preemptions", "emitted")
V0_FIELDS = ("ignored_iter", "finish_reason")
DECIDED = ("sched", "np", "nd", "ctx", "preempted", "waiting", "used_blocks")


def simulate(spec: dict[str, Any]) -> dict[str, Any]:
    """By the plain Python reference that has this spec's options."""
    return (caching if "enable_prefix_caching" in spec["config"] else engine).simulate(spec)


def differences(specs: list[dict[str, Any]], pieces: int = 0, most_iterations: int = MAX_ITERATIONS) -> list[str]:
    """What differs between the three ways on these specs of one variant, in float64, exactly; a line each, with the
    spec's index. `pieces` are those of prompts that share segments.
    """
    fields = FIELDS + (V0_FIELDS if specs[0].get("engine") == "V0" else ())
    with jax.enable_x64(True):
        most_requests = max(MAX_REQUESTS, *(len(spec["requests"]) for spec in specs))
        batch = Batch(specs + specs[:1] * (CHUNK - len(specs)), most_requests, pieces, RUNS)
        jumps, iterations = batch.by_jumps(), batch.by_iterations(most_iterations)
    found = []
    for index, spec in enumerate(specs):
        wanted = simulate(spec)
        records = wanted["iterations"]
        totals = {total: sum(record[total] for record in records) for total in ("np", "nd", "ctx")}
        for way, got in (("jumps", jumps[index]), ("iterations", iterations[index])):
            expected = {
                "status": wanted["status"],
                "summary": {key: wanted["summary"][key] for key in ("iterations", "preemptions", "end_time")},
                "per_request": {
                    identifier: {field: request[field] for field in fields}
                    for identifier, request in wanted["per_request"].items()
                },
                "totals": totals,
            }
            found += [
                f"case {index}: by {way}: {key}: {got[key]} instead of {value}"
                for key, value in expected.items()
                if got[key] != value
            ]
        decided = [{field: record[field] for field in DECIDED} for record in records]
        if iterations[index]["iterations"] != decided:
            found.append(f"case {index}: the decisions of the iterations differ")
    return found


def sharing_differences(specs: list[dict[str, Any]]) -> list[str]:
    """What differs between the reference and `replay` on these specs with prefix caching; a line each."""
    found = []
    with jax.enable_x64(True):
        for index, spec in enumerate(specs):
            wanted, got = caching.simulate(spec), replay(spec)
            requests = {
                identifier: {**{field: request[field] for field in FIELDS}, "cached_tokens": request["cached_total"]}
                for identifier, request in wanted["per_request"].items()
            }
            summary = {key: wanted["summary"][key] for key in SUMMARY}
            if got != {"status": wanted["status"], "per_request": requests, "summary": summary}:
                found.append(f"case {index}: the results differ: {got} instead of {requests}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int, nargs="?", default=200, help="how many of each variant (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    failed = 0
    for variant in [*VARIANTS, *PREFIXES, SHARING]:
        rng = np.random.default_rng(arguments.seed)
        done = 0
        while done < arguments.cases:
            number = min(CHUNK, arguments.cases - done)
            if variant == SHARING:
                found = sharing_differences([sharing_case(rng) for _ in range(number)])
            elif variant in PREFIXES:
                found = differences([prefix_case(rng, PREFIXES[variant], PIECES) for _ in range(number)], PIECES)
            else:
                found = differences([variant_case(rng, variant) for _ in range(number)])
            for line in found:
                failed += 1
                print(line)
            done += number
            print(f"{variant}: {done} of {arguments.cases} cases, {failed} differences", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
