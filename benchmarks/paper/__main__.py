"""Runs the paper's experiments: trains the policies, evaluates all routers on the same requests, and writes reports.

If it is stopped and started again, it continues: finished jobs are stored in the work folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.paper.claims import claims_table
from benchmarks.paper.jobs import run_evaluation, run_training, start_worker
from benchmarks.paper.pictures import picture
from benchmarks.paper.plan import FULL, QUICK, Question, questions
from benchmarks.paper.prepare import missing_data, prepare
from benchmarks.paper.tables import ablation_table, qos_table, write_csv
from jaxroute.errors import UserError, command, require_known
from jaxroute.files import write_text


@command
def main(argv: Sequence[str] | None = None) -> int:
    every = questions(QUICK)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        epilog="Questions: " + "; ".join(f"{name}: {q.title}, by {q.axis}" for name, q in every.items()),
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="which (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer seeds, frames and episodes: an hour on two cores")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), metavar="DIR", help="recorded traces and text"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="runs and evaluations (default runs/paper[-quick])")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for CSV, pictures, results.md (default: that of --work)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at a time, one per core (default: all)"
    )
    arguments = parser.parse_args(argv)
    names = [require_known(name, every, "question") for name in arguments.questions] or list(every)
    if not 1 <= arguments.jobs <= (os.cpu_count() or 1):
        raise UserError(f"--jobs {arguments.jobs}: expected 1 to {os.cpu_count()}, one per core")
    work = arguments.work or Path("runs") / ("paper-quick" if arguments.quick else "paper")
    out = arguments.out or work
    for folder in (work, out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    planned = questions(QUICK if arguments.quick else FULL)
    chosen = {name: planned[name] for name in names}
    for name, question in list(chosen.items()):
        lacking = [missing for need in question.needs if (missing := missing_data(need, arguments.data))]
        if lacking:
            print(f"{name}: left out, no {lacking[0]}; give its folder with --data", file=sys.stderr)
            del chosen[name]
    run_all(chosen, work, arguments.data, arguments.jobs)
    report(chosen, work, out)
    return 0


def run_all(chosen: dict[str, Question], work: Path, data: Path, jobs: int) -> None:
    """Prepares, trains and evaluates, `jobs` at a time; prints one line per finished job."""
    cores = sorted(os.sched_getaffinity(0))[:jobs] if hasattr(os, "sched_getaffinity") else [None] * jobs
    context = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, start_worker, (core if jobs > 1 else None,)) for core in cores]
    settings = [setting for question in chosen.values() for setting in question.settings]
    trainings = {run.folder: run for setting in settings for _, runs in setting.policies for run in runs}
    needs = list(dict.fromkeys(need for question in chosen.values() for need in question.needs))
    total = len(needs) + len(trainings) + len(settings)
    started, done = time.monotonic(), 0
    prepared: dict[str, str] = {}

    def run(what: str, tasks: list[tuple[str, Callable[..., object], tuple[Any, ...]]]) -> list[object]:
        """Gives each free pool its next task, so that long tasks do not wait behind each other."""
        nonlocal done
        results, waiting, running = {}, list(enumerate(tasks)), {}

        def start(pool: ProcessPoolExecutor) -> None:
            if waiting:
                index, (name, function, inputs) = waiting.pop(0)
                running[pool.submit(function, *inputs)] = (index, name, pool)

        for pool in pools:
            start(pool)
        while running:
            future: Future[object] = next(as_completed(running))
            index, name, pool = running.pop(future)
            results[index] = future.result()
            done += 1
            passed = timedelta(seconds=round(time.monotonic() - started))
            text = results[index] if isinstance(results[index], str) else "ready"
            print(f"[{done}/{total}, {passed}] {what} {name}: {text}", flush=True)
            start(pool)
        return [results[index] for index in range(len(tasks))]

    try:
        made = run("prepare", [(need, prepare, (need, work, data)) for need in needs])
        for values in made:
            prepared.update(values)  # pyright: ignore[reportCallIssue, reportArgumentType]
        run("train", [(name, run_training, (work, job, prepared)) for name, job in trainings.items()])
        run("evaluate", [(job.name, run_evaluation, (work, job, prepared)) for job in settings])
    except BrokenProcessPool:
        raise UserError(
            f"a process died, perhaps because memory ran out; the same command continues from {work}"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command continues from {work}") from None
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def report(chosen: dict[str, Question], work: Path, out: Path) -> None:
    """Writes CSV, picture and table of each question, and the claims."""
    parts = ["# The paper's experiments\n"]
    for name, question in chosen.items():
        write_csv(out / f"{name}.csv", work, question)
        picture(out / f"{name}.png", work, question)
        table = ablation_table(work, question.settings) if name == "ablations" else qos_table(work, question)
        parts.append(f"## {name}: {question.title}\n\n{table}")
    parts.insert(1, f"## Claims\n\n{claims_table(work, chosen)}")
    write_text(out / "results.md", "\n".join(parts))
    print(parts[1])
    print(f"tables, CSV and pictures in {out}")


if __name__ == "__main__":
    sys.exit(main())
