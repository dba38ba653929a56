"""`jaxroute evaluate RUN`: evaluates a trained router again, on any number of episodes and with any seed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxroute.agent.trainer import policy_router
from jaxroute.config.build import Experiment, build_experiment
from jaxroute.config.loader import load_saved_config
from jaxroute.config.schema import Config, TrainingConfig
from jaxroute.console import print_notes, report_console
from jaxroute.errors import UserError, command
from jaxroute.evaluation.episodes import EpisodeValues, evaluate_routers
from jaxroute.evaluation.tables import print_evaluation
from jaxroute.evaluation.tuning import Tuning, tuned_routers
from jaxroute.routers import ROUTERS, SLOW
from jaxroute.runs.checkpoint import load_params


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the metrics of a run's router and of others. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute evaluate",
        description="Evaluate a run's trained router against others, on the same requests for each.",
        epilog=f"Routers: trained, {', '.join(ROUTERS)}",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that jaxroute train wrote")
    parser.add_argument("--episodes", type=int, help="fresh episodes, 2 or more (default: as in the run)")
    parser.add_argument("--seed", type=int, help="seed of the request streams (default: as in the run)")
    parser.add_argument("--routers", metavar="NAMES", help=(
        f"names separated by commas, or all, which are those without {', '.join(SLOW)} (default: as in the run)"
    ))  # fmt: skip
    arguments = parser.parse_args(argv)
    if not (arguments.run / "config.yaml").is_file():
        raise UserError(f"{arguments.run}: has no config.yaml; give a folder that jaxroute train wrote")

    fast = [name for name in ROUTERS if name not in SLOW]
    names = ",".join(["trained", *fast]) if arguments.routers == "all" else arguments.routers
    routers = None if names is None else f"[{names}]"
    given = {"episodes": arguments.episodes, "seed": arguments.seed, "routers": routers}
    overrides = [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]
    config = load_saved_config(arguments.run / "config.yaml", overrides)
    experiment = build_experiment(config)
    params = load_params(arguments.run, experiment.network, experiment.env, experiment.params)
    console = report_console()
    print_notes(console, experiment.notes)
    print_evaluation(console, compare(config, experiment, params, console))
    return 0


def compare(config: Config, experiment: Experiment, params: Any, console: Console) -> dict[str, EpisodeValues]:
    """Metrics of the routers in `evaluation.routers`, in that order; `params` are the variables of the trained network.

    Tunable routers are tuned to the scenario first, each with as many decisions as the training. Prints one line per
    evaluated router, and the tuned parameters.
    """
    env, env_params, evaluation = experiment.env, experiment.params, config.evaluation

    def tuned(name: str, tuning: Tuning) -> None:
        if tuning.parameters:
            numbers = ", ".join(f"{key}={value:.4g}" for key, value in tuning.parameters.items())
            spent = "kept" if tuning.kept else f"{tuning.decisions:,} decisions, {tuning.seconds:.0f} s"
            console.print(f"tuned {name}: {numbers} ({spent})", highlight=False)

    trained = policy_router(experiment.network, params)
    names, budget = evaluation.routers, decisions(config.training)
    routers = tuned_routers(env, env_params, names, trained=trained, decisions=budget, done=tuned)

    def done(name: str, values: EpisodeValues) -> None:
        console.print(f"evaluated {name}: QoS {values['qos'].mean():.4f}", highlight=False)

    return evaluate_routers(env, env_params, routers, evaluation.episodes, evaluation.seed, done)


def decisions(training: TrainingConfig) -> int:
    """Simulated decisions of a training, with the search for its start, the start's improvement and all validations."""
    starts = 1 + bool(training.start_decisions and training.improvement_decisions)
    validated = (training.validations + starts) * training.validation_decisions
    return training.frames + training.start_decisions + training.improvement_decisions + validated
