"""`jaxroute suite`: trains and evaluates on every environment of a suite, and draws the results."""

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from jaxroute.agent.trainer import policy_router
from jaxroute.commands import train
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import config_text, load_config, load_saved_config
from jaxroute.console import report_console
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, command, require_known
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.evaluation.tuning import Tuning, tune_routers
from jaxroute.files import read_json
from jaxroute.routers import ROUTERS, Parameters, make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params
from jaxroute.suites.description import SUITES, Suite, suite
from jaxroute.suites.report import PICTURE, TABLE, write_report
from jaxroute.suites.results import RESULTS, SuiteFolder, read_results


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing of a suite, or adds columns to its results. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute suite",
        description="Train and evaluate on every environment of a suite, beside tuned rules. If it was interrupted, "
        "the same command continues it.",
        epilog=f"Suites: {', '.join(SUITES)}. docs/suite.md describes them, the results, and columns of your own.",
    )
    parser.add_argument("suite", nargs="?", default="routing-v1", metavar="SUITE", help="default: routing-v1")
    parser.add_argument("--environments", metavar="NAMES", help="some of them, separated by commas (default: all)")
    parser.add_argument("--seeds", metavar="SEEDS", help="some of the suite's seeds of trainings (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: runs/suite-SUITE)")
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        metavar="FILE",
        help=f"add the columns of a results file to DIR/{RESULTS}, and compute nothing",
    )
    arguments = parser.parse_args(argv)
    chosen = suite(arguments.suite)
    folder = arguments.out or Path("runs") / f"suite-{chosen.name}"
    console = report_console()
    if arguments.add:
        results = read_results(folder / RESULTS, chosen)
        for path in arguments.add:
            try:
                results = results.with_columns(read_results(path, chosen).columns)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        results.write(folder / RESULTS)
        write_report(folder, results)
    else:
        environments = _chosen(arguments.environments, chosen.environments, f"environment of {chosen.name}")
        seeds = _chosen(arguments.seeds, [str(seed) for seed in chosen.seeds], f"seed of {chosen.name}")
        try:
            _run(chosen, environments, [int(seed) for seed in seeds], folder, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on") from None
    console.print(f"{RESULTS}, {TABLE} and {PICTURE} in {folder}", highlight=False)
    return 0


def _chosen(names: str | None, known: Sequence[str], what: str) -> list[str]:
    """The names of a list separated by commas, in the order of `known`; all of them if it is None."""
    given = known if names is None else [require_known(name.strip(), known, what) for name in names.split(",")]
    return [name for name in known if name in given]


class _Job(NamedTuple):
    environment: str
    name: str  # of the part of its results
    compute: Callable[[], dict[str, Any]]


def _run(chosen: Suite, environments: Sequence[str], seeds: Sequence[int], path: Path, console: Console) -> None:
    texts = [config_text(load_config(None, changes)) for changes in chosen.trained.values()]
    folder = SuiteFolder(path, chosen, hashlib.sha256("".join(texts).encode()).hexdigest())
    jobs = [job for name in environments for job in _jobs(chosen, name, seeds, folder, console)]
    missing = [job for job in jobs if folder.part(job.environment, job.name) is None]
    console.print(f"{len(jobs)} parts, {len(jobs) - len(missing)} of them finished, in {path}", highlight=False)
    for number, job in enumerate(missing, 1):
        started = time.monotonic()
        part = job.compute()
        seconds = round(time.monotonic() - started, 1)
        folder.finish(job.environment, job.name, {**part, "seconds": seconds})
        line = f"{job.environment}, {job.name}: {_summary(part)}, {seconds:.0f} s"
        console.print(f"[{number}/{len(missing)}] {line}", highlight=False, markup=False)
        if number < len(missing) and missing[number].environment != job.environment:
            _publish(folder)
            # Linux limits a process to 65,530 memory maps, which the programs of a few environments use up.
            jax.clear_caches()
    _publish(folder)


def _publish(folder: SuiteFolder) -> None:
    results = folder.results()
    results.write(folder.path / RESULTS)
    write_report(folder.path, results)


def _jobs(chosen: Suite, environment: str, seeds: Sequence[int], folder: SuiteFolder, console: Console) -> list[_Job]:
    """The parts of one environment. Each reads those before it from the folder."""

    def rules() -> dict[str, Any]:
        return folder.part(environment, "rules") or {}

    def tuned(name: str) -> Parameters:
        return rules()["parameters"][name]

    def rule(name: str) -> dict[str, Any]:
        column = chosen.evaluate(lambda env, _: make_router(name, env, **tuned(name)), [environment])
        return {"router": name, "parameters": tuned(name), "qos": column[environment]}

    def untuned(name: str) -> dict[str, Any]:
        return {"qos": chosen.evaluate(lambda env, _: make_router(name, env), [environment])[environment]}

    def ceiling() -> dict[str, Any]:
        """A router that follows another one in its simulations follows the index rule."""

        def router_for(env: RoutingEnvironment, _: EnvParams) -> Router:
            index_rule = make_router(chosen.index_rule, env, **tuned(chosen.index_rule))
            follows = {"policy": index_rule} if ROUTERS[chosen.ceiling].follows else {}
            return make_router(chosen.ceiling, env, **follows)

        return {"router": chosen.ceiling, "qos": chosen.evaluate(router_for, [environment], ["short"])[environment]}

    def training(column: str, seed: int) -> dict[str, Any]:
        return _trained(chosen, environment, column, seed, folder.path / "trainings")

    jobs: list[_Job] = [
        _Job(environment, "rules", lambda: _rules(chosen, environment, console)),
        _Job(environment, "index_rule", lambda: rule(chosen.index_rule)),
        _Job(environment, "best_other_rule", lambda: rule(rules()["best_other_rule"])),
        *(_Job(environment, name, partial(untuned, name)) for name in chosen.untuned),
        _Job(environment, "ceiling", ceiling),
    ]
    for column in chosen.trained:
        jobs += [_Job(environment, f"{column}-{seed}", partial(training, column, seed)) for seed in seeds]
    return jobs


def _rules(chosen: Suite, environment: str, console: Console) -> dict[str, Any]:
    """Tunes all rules, and chooses on episodes that neither the tuning nor the evaluation has: the best other rule,
    which is then tuned as long as the index rule, and the better of these two.
    """

    def done(name: str, tuning: Tuning) -> None:
        if tuning.parameters and not tuning.kept:
            console.print(f"tuned {name}: {tuning.decisions:,} decisions, {tuning.seconds:.0f} s", highlight=False)

    parameters: dict[str, Parameters] = {}

    def tune(names: Sequence[str], decisions: int) -> None:
        tunings = tune_routers(*chosen.make(environment, chosen.evaluation), names, decisions=decisions, done=done)
        parameters.update((name, tuning.parameters) for name, tuning in tunings.items())

    def selection_qos() -> dict[str, float]:
        env, params = chosen.make(environment, chosen.selection)
        routers = {name: make_router(name, env, **numbers) for name, numbers in parameters.items()}
        values = evaluate_routers(env, params, routers, chosen.selection.number, chosen.selection.seed)
        return {name: float(metrics["qos"].mean()) for name, metrics in values.items()}

    tune([chosen.index_rule], chosen.decisions)
    tune(chosen.rules, chosen.rule_decisions)
    qos = selection_qos()
    best = max(chosen.rules, key=qos.__getitem__)
    tune([best], chosen.decisions)
    qos = selection_qos()
    return {
        "parameters": parameters,
        "selection_qos": qos,
        "best_other_rule": best,
        "best_rule": "best_other_rule" if qos[best] > qos[chosen.index_rule] else "index_rule",
    }


def _trained(chosen: Suite, environment: str, column: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains, or goes on with a training, and evaluates its policy."""
    run, evaluation, short = folder / environment / f"{column}-{seed}", chosen.evaluation, chosen.short
    if (run / "config.yaml").is_file():
        arguments = ["--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # killed before it was begun
        run.parent.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"--out={run}",
            f"--seed={seed}",
            f"environment.id={environment}",
            f"environment.episode_length={evaluation.length}",
            f"evaluation={{episodes: {evaluation.number}, seed: {evaluation.seed}, routers: [trained]}}",
            "training.loggers=[]",
            *(f"environment.{key}={value}" for key, value in chosen.options.items()),
            *chosen.trained[column],
        ]
    code = train.main(arguments)
    if code:
        print("the same command goes on with the suite", file=sys.stderr)
        sys.exit(code)
    own = read_json(run / "evaluation.json")["routers"]["trained"]["qos_per_episode"]
    # The environment as it was trained on, whose observations may be other than the suite's.
    config = load_saved_config(run / "config.yaml", [f"environment.episode_length={short.length}"])
    experiment = build_experiment(config)
    params = load_params(run, experiment.network, experiment.env, experiment.params)
    routers = {"trained": policy_router(experiment.network, params)}
    values = evaluate_routers(experiment.env, experiment.params, routers, short.number, short.seed)
    return {"qos": {"evaluation": [own], "short": [values["trained"]["qos"].astype(float).tolist()]}}


def _summary(part: dict[str, Any]) -> str:
    if "qos" not in part:
        return f"best other rule {part['best_other_rule']}"
    runs = part["qos"].get("evaluation") or part["qos"]["short"]
    return f"QoS {sum(runs[0]) / len(runs[0]):.4f}"
