"""Mistakes in the rules of docs/simulation.md section 1c, one by one: does what holds the simulator notice each?

    python -m tests.planted    # the engines in JAX, each mistake in a copy of the package: a quarter of an hour

Those of `block_engine`, which `replay` runs, are in tests/test_planted.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SIMULATOR = ROOT / "jaxroute" / "simulator"
CASES, SEED = 400, 11


class Mistake(NamedTuple):
    rule: str
    file: str  # of `SIMULATOR`
    right: str  # in it once
    wrong: str
    variant: str = ""  # of the cases of `tests.fuzz` that run it

    def planted(self) -> str:
        """The content of the file with the mistake."""
        text = (SIMULATOR / self.file).read_text(encoding="utf-8")
        assert text.count(self.right) == 1, (
            f"{self.rule}: {self.file} has {self.right!r} {text.count(self.right)} times"
        )
        return text.replace(self.right, self.wrong)


def _block(rule: str, right: str, wrong: str) -> Mistake:
    return Mistake(rule, "block_engine.py", right, wrong)


IN_REPLAY = (
    _block("A1", "alone and not self.threshold_when_alone", "alone and self.threshold_when_alone"),
    _block("B1: the prefix", "own = (keys[-1] if keys else None, next(request.pieces))", "own = next(request.pieces)"),
    _block("B2: one token", "range((request.length - 1) // self.size)", "range(request.length // self.size)"),
    _block("B2: which copy", "found.append(blocks[0])", "found.append(blocks[-1])"),
    _block("B3", "tokens = min(request.length - cached, limit)", "tokens = min(request.length, limit)"),
    _block("B4: held", "sum(self.pool.holders[block] > 0 for block in found)", "0"),
    _block("B4: free", "sum(self.pool.holders[block] > 0 for block in found)", "len(found)"),
    _block("B4: whole", "self._blocks_for(request.length) if self.whole else 0", "0"),
    _block("B5", "del self.free[block]\n            self.holders", "pass\n            self.holders"),
    _block("B6", "self.free.popitem(last=False)", "self.free.popitem(last=True)"),
    _block("B7: at once", "self._hash(request, min(request.computed, request.length))  # rule C6", "pass"),
    _block("B7: copies", "self.cached.setdefault(key, []).append(block)", "self.cached.setdefault(key, [block])"),
    _block("B8: reverse", "for block in reversed(blocks):", "for block in blocks:"),
    _block("B8: in front", "is None and self.unhashed_first:", "is None:"),
    _block(
        "B9: finds its own",
        "found: list[int] = []\n        if self",
        "found: list[int] = []\n        if not request.preemptions and self",
    ),
    _block("B9: nobody joins", "while not preempted and self.waiting", "while self.waiting"),
    _block("B10", "- len(request.blocks)\n", "- len(request.blocks) + (request.generated == 0)\n"),
    _block("B11: a new prompt", "tokens == 1 and length > request.prompt and", "tokens == 1 and"),
    _block("B11: context", "context = sum(entry.request.computed", "context = sum(entry.tokens"),
    _block("C1", "depth = 2 if options.async_scheduling else 1", "depth = 1"),
    _block(
        "C2: in flight",
        "tokens = min(length - request.computed, limit, budget,",
        "tokens = min(request.length - request.computed, limit, budget,",
    ),
    _block("C3", "if tokens <= 0 or ends:", "if tokens <= 0:"),
    _block("C4", "length >= request.prompt + request.most or", "length >= request.prompt + request.output or"),
    _block(
        "C5",
        "(iteration if by_iteration else now):",
        "(iteration if by_iteration else flights[0][1] if flights else now):",
    ),
    _block("C6", "self._hash(request, min(request.computed, request.length))", "self._hash(request, request.computed)"),
    _block(
        "C7: the token",
        "if not samples or request.finish_time is not None:",
        "if not samples or request.finish_time is not None or request.preemptions and not request.computed:",
    ),
    _block(
        "C7: the end",
        "(self.running if request in self.running else self.waiting).remove(request)",
        "request in self.running and self.running.remove(request)",
    ),
    _block(
        "C8: no time",
        "elif not flights:  # rule C8",
        "elif flights:\n                flights.append(([], flights.pop()[1] + latency[0]))\n            else:",
    ),
    _block("C8: alone", "now += latency[0]", "pass"),
)
"""Rules A1, B1 to B11 and C1 to C8. A2 changes nothing, B12 and B13 follow from the others, and C9 is a default."""

_CACHING, _BOTH, _OLD = "V1 caching", "V1 caching, async", "V1 of vLLM 0.19"
_SHARED, _SHARED_BOTH = "V1 prefixes", "V1 prefixes, async"

_KNOWN = "known = state.computed if state.flight is None else state.computed - state.flight.unhashed  # rule C6"

IN_JAX = (
    Mistake("A1", "scheduler.py", "limited &= total(state.unfinished()) > 1", "pass", _CACHING),
    Mistake(
        "B2, own",
        "prefix_cache.py",
        "found=jnp.where(victim, full, cache.found)",
        "found=jnp.where(victim, held, cache.found)",
        _CACHING,
    ),
    Mistake(
        "B2, ranges",
        "scheduler_prefixes.py",
        "most = jnp.maximum(full_blocks(own_length - 1, params.block_size), 0)",
        "most = full_blocks(own_length, params.block_size)",
        _SHARED,
    ),
    Mistake(
        "B3, ranges",
        "scheduler_prefixes.py",
        "wanted = jnp.minimum(own_length - found * params.block_size, limit)",
        "wanted = jnp.minimum(own_length, limit)",
        _SHARED,
    ),
    Mistake(
        "B4, ranges",
        "scheduler_prefixes.py",
        "& (free_blocks(cache) + held >= jnp.maximum(blocks, whole))",
        "& (free_blocks(cache) >= jnp.maximum(blocks, whole))",
        _SHARED,
    ),
    Mistake(
        "B5, own",
        "scheduler.py",
        "    computed = computed + found * params.block_size\n\n    blocks",
        "    computed = computed + 0 * found\n\n    blocks",
        _CACHING,
    ),
    Mistake(
        "B5, ranges",
        "prefix_runs.py",
        "bounds=jnp.stack([jnp.maximum(first, taken), end])",
        "bounds=jnp.stack([first + 0 * taken, end])",
        _SHARED,
    ),
    Mistake(
        "B6, own",
        "prefix_cache.py",
        "found=jnp.maximum(cache.found - evicted, 0), ahead",
        "found=cache.found, ahead",
        _CACHING,
    ),
    Mistake(
        "B6, ranges",
        "prefix_runs.py",
        "at = order == lowest(jnp.where(first < end, order, LARGE))",
        "at = order == -lowest(jnp.where(first < end, -order, 1))",
        _SHARED,
    ),
    Mistake(
        "B7, ranges",
        "prefix_runs.py",
        "held = jnp.max(jnp.minimum(common_blocks(path, cache.path), hashed), axis=0)",
        "held = 0 * jnp.max(hashed, axis=0)",
        _SHARED,
    ),
    Mistake(
        "B8, own",
        "prefix_cache.py",
        "return cache.replace(ahead=cache.ahead + without_content)",
        "return cache",
        _CACHING,
    ),
    Mistake(
        "B8, own, before 0.23",
        "prefix_cache.py",
        "    if not params.unhashed_first:\n        return cache\n    hashed",
        "    hashed",
        _OLD,
    ),
    Mistake(
        "B8, ranges",
        "prefix_runs.py",
        "first = jnp.minimum(jnp.max(jnp.where(others, common, 0), axis=0), own)",
        "first = 0 * own",
        _SHARED,
    ),
    Mistake(
        "B9, own",
        "prefix_cache.py",
        "ahead=jnp.where(victim, free + without_content, cache.ahead + in_front)",
        "ahead=jnp.where(victim, without_content, cache.ahead + in_front)",
        _CACHING,
    ),
    Mistake(
        "B9, ranges",
        "scheduler_prefixes.py",
        "cache = release(cache, at, left & ~at, hashed, held, params)",
        "cache = release(cache, at, left & ~at, 0 * hashed, held, params)",
        _SHARED,
    ),
    Mistake(
        "B11",
        "scheduler.py",
        "computed = computed + found * params.block_size\n    else:",
        "computed = computed + 0 * found\n    else:",
        _SHARED,
    ),
    Mistake(
        "C1",
        "advance.py",
        "jnp.where(is_first & nothing, duration, flight.duration)",
        "jnp.where(is_first & nothing, duration, duration)",
        "V1 async",
    ),
    Mistake("C2", "scheduler.py", "length += state.flight.sampled\n", "pass\n", "V1 async"),
    Mistake("C3", "scheduler.py", "may_get &= ~_ends_when_delivered(state, state.flight)", "pass", "V1 async"),
    Mistake(
        "C4",
        "scheduler.py",
        "return flight.sampled & flight.known_end & (state",
        "return flight.sampled & (state",
        "V1 async",
    ),
    Mistake(
        "C6, own",
        "prefix_cache.py",
        f"{_KNOWN}\n\n    def preempt",
        "known = state.computed\n\n    def preempt",
        _BOTH,
    ),
    Mistake(
        "C6, ranges",
        "prefix_runs.py",
        _KNOWN,
        "known = state.computed",
        _SHARED_BOTH,
    ),
    Mistake(
        "C7",
        "advance.py",
        "delivered = flight.sampled & state.unfinished()",
        "delivered = flight.sampled & state.unfinished() & (state.position < output.num_running)",
        "V1 async",
    ),
    Mistake(
        "C8",
        "advance.py",
        "duration=jnp.where(nothing, 0, duration)",
        "duration=duration",
        "V1 async",
    ),
)

_RUN = f"""
import sys
import numpy as np
from tests.fuzz import PIECES, PREFIXES, differences, prefix_case, variant_case
rng, name = np.random.default_rng({SEED}), sys.argv[1]
if name in PREFIXES:
    found = differences([prefix_case(rng, PREFIXES[name], PIECES) for _ in range({CASES})], PIECES)
else:
    found = differences([variant_case(rng, name) for _ in range({CASES})])
print(len({{line.split(":")[0] for line in found}}))
"""


def noticed(mistake: Mistake) -> str:
    """What the cases of the mistake's variant say of the package with the mistake: in how many something differs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in ("jaxroute", "tests"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        if mistake.file:
            (folder / "jaxroute" / "simulator" / mistake.file).write_text(mistake.planted(), encoding="utf-8")
        command = [sys.executable, "-c", _RUN, mistake.variant]
        settings = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def main() -> int:
    missed = 0
    for variant in sorted({mistake.variant for mistake in IN_JAX}):
        print(
            f"{variant} without a mistake: {noticed(Mistake('', '', '', '', variant))} of {CASES} cases differ",
            flush=True,
        )
    for mistake in IN_JAX:
        found = noticed(mistake)
        missed += found == "0"
        print(f"{mistake.rule} ({mistake.file}): {found} of {CASES} cases differ", flush=True)
    print(f"{len(IN_JAX) - missed} of {len(IN_JAX)} mistakes are noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
