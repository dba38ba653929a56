"""Shared parts of the benchmarks: options, timing, the machine and its memory bandwidth, tables and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from rich.table import Table

from jaxroute.errors import UserError
from jaxroute.files import write_text

Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """A parser with the options that all benchmarks share; it reports a wrong option as a one-line `UserError`."""

    def __init__(self, entry: str, description: str | None):
        super().__init__(
            prog=f"python -m benchmarks.{entry}".removesuffix(".__main__"),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--quick", action="store_true", help="fewer and shorter calls, for a first impression")

    def add_measuring(self) -> None:
        self.add_argument("--repeats", type=count, metavar="N", help="timed calls (default 5; 3 with --quick)")
        self.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The checked options; that --json cannot be written is reported now instead of after minutes."""
        arguments = self.parse_intermixed_args(argv)
        if "repeats" in arguments:
            arguments.repeats = arguments.repeats or (3 if arguments.quick else 5)
        if getattr(arguments, "json", None):
            writable(arguments.json, "--json")
        return arguments


def writable(path: Path, option: str) -> None:
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written; name a file in a folder that exists and is writable")


def count(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


def rate(text: str) -> float:
    """The type of an option: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")
    return value


def cores() -> int:
    """Number of cores that this process, and XLA's threads, may use."""
    return len(os.sched_getaffinity(0))


def split_cpu(number: int) -> None:
    """Makes the CPU this number of devices, unless JAX has been used already."""
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)


def use_devices(number: int) -> None:
    """Checks that there are this many devices."""
    if number > 1:
        split_cpu(number)
    if jax.device_count() < number:
        raise UserError(
            f"--shards {number}: JAX has {jax.device_count()} device(s) here; ask for no more shards than that"
        )


def spread(calls: Sequence[float], work: float) -> Row:
    """Rates per second of calls that did `work` each, from their durations in seconds."""
    return {"slowest": work / max(calls), "median": work / statistics.median(calls), "fastest": work / min(calls)}


class Measured(NamedTuple):
    """`row` has rates, compile_seconds, bytes and flops of one step by XLA's cost analysis, and bandwidth."""

    row: Row
    carry: Any
    output: Any  # output of the last call


def measure(
    run: Callable[..., tuple[Any, Any]],
    carry: Any,
    inputs: Sequence[Any],
    work: float,
    repeats: int,
    warm_up: int = 1,
    second_start: bool = False,
) -> Measured:
    """Times `run(carry, key, *inputs) -> (carry, output)`, one scan, which does `work` per call.

    Compilation is timed separately. Then there are `warm_up` untimed calls and `repeats` timed calls, each ended by
    `block_until_ready`. The carry is donated. With `second_start`, the time to trace the program again and to read it
    from the persistent compilation cache is measured too. The memory bandwidth is measured directly afterwards, since
    the speed of a machine changes.
    """

    def compiled() -> tuple[Any, float]:
        start = time.perf_counter()
        program = jax.jit(run, donate_argnums=0).lower(carry, jax.random.key(0), *inputs).compile()
        return program, time.perf_counter() - start

    with _persistent_cache() if second_start else nullcontext():
        program, compile_seconds = compiled()
        second_start_seconds = None
        if second_start:
            jax.clear_caches()
            second_start_seconds = compiled()[1]
    calls, output = [], None
    for call in range(warm_up + repeats):
        key = jax.block_until_ready(jax.random.key(call))
        start = time.perf_counter()
        carry, output = jax.block_until_ready(program(carry, key, *inputs))
        calls.append(time.perf_counter() - start)
    # XLA counts the body of a loop once: one step of the scan, and in it one round of every inner loop.
    cost = program.cost_analysis() or {}
    row = {
        **spread(calls[warm_up:], work),
        "compile_seconds": compile_seconds,
        "second_start_seconds": second_start_seconds,
        "step_bytes": cost.get("bytes accessed", math.nan),
        "step_flops": cost.get("flops", math.nan),
        "bandwidth": bandwidth(),
    }
    return Measured(row, carry, output)


@contextmanager
def _persistent_cache() -> Generator[None]:
    """Uses an empty persistent compilation cache, and afterwards none."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def tree_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bandwidth() -> float:
    """Memory bandwidth of the default device, bytes/s: the fastest of five runs of ten sums a = b + 2 a in place."""
    size = 2**24 if jax.default_backend() == "cpu" else 2**28
    a, b = jnp.ones(size, jnp.float32), jnp.ones(size, jnp.float32)
    sums = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, a: b + 2 * a, a), donate_argnums=0)
    calls = []
    for _ in range(6):
        start = time.perf_counter()
        a = jax.block_until_ready(sums(a, b))
        calls.append(time.perf_counter() - start)
    return 3 * 10 * b.nbytes / min(calls)


def machine(argv: Sequence[str] | None, entry: str) -> dict[str, Any]:
    """The machine and versions that the figures are for."""
    arguments = sys.argv[1:] if argv is None else argv
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}" if device.platform != "cpu" else processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join([f"python -m benchmarks.{entry}".removesuffix(".__main__"), *arguments]),
    }


def processor() -> str:
    """The name of the CPU, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the clone, marked if files differ from it; empty without git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


class Column(NamedTuple):
    key: str
    head: str
    form: str = ",.0f"


def table(title: str, columns: Sequence[Column], rows: Sequence[Row], caption: str) -> Table:
    """A table of rows; a missing or NaN value is shown as a dash."""
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in columns:
        shown.add_column(column.head, justify="right" if column.form else "left")
    for row in rows:
        shown.add_row(*(_cell(row.get(column.key), column.form) for column in columns))
    return shown


def _cell(value: Any, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def report(shown: Sequence[Table], record: dict[str, Any], json_path: Path | None) -> None:
    """Prints tables and the machine; writes `record`, with "machine" in it, as JSON."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for one in shown:
        console.print(one)
    console.print(", ".join(f"{key} {value}" for key, value in record["machine"].items()), highlight=False)
    if json_path:
        write_text(json_path, json.dumps(_finite(record), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
