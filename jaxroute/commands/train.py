"""`jaxroute train`: trains a router, compares it with the heuristics, and writes the results into a folder."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxroute.agent.improvement import compare_actions, improve
from jaxroute.agent.router_network import RouterNetwork, with_linear_policy
from jaxroute.agent.start import Validator, linear_start
from jaxroute.agent.trainer import TrainState, policy_router
from jaxroute.commands.evaluate import compare
from jaxroute.config.build import Experiment, build_experiment, build_trainer
from jaxroute.config.loader import config_text, dotted_values, load_config, load_saved_config
from jaxroute.config.schema import Config
from jaxroute.console import print_notes, report_console
from jaxroute.environment.metrics import summarize
from jaxroute.environment.observation import expert_features
from jaxroute.errors import UserError, command
from jaxroute.evaluation.pictures import learning_curve, qos_comparison
from jaxroute.evaluation.tables import print_evaluation, write_evaluation
from jaxroute.files import write_text
from jaxroute.routers import ROUTERS
from jaxroute.routers.linear import universal_weights
from jaxroute.runs.checkpoint import save_checkpoint
from jaxroute.runs.loggers import check_loggers
from jaxroute.runs.metrics_log import MetricsLog
from jaxroute.runs.progress import TrainingProgress
from jaxroute.runs.run_folder import prepare_run_folder, versions
from jaxroute.runs.search_log import SearchLog
from jaxroute.runs.stopping import Stop
from jaxroute.runs.training_state import TrainingStates, newest_state, remove_states

LAST_FILE = "qos.png"  # a run with this file is finished
VERSIONS = "versions.json"
_FAR_BELOW = 0.9  # share of the sampled policy's QoS below which a greedy policy is reported


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, evaluates, and writes the folder of the run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute train",
        description="Train a router and compare it with the routers of evaluation.routers.",
        epilog="Example: jaxroute train workload.arrivals.rate=4 agent.gamma=0.95 --seed 1. "
        f"Routers: {', '.join(ROUTERS)}",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: configs/default.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the training; the same as training.seed=SEED")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the run (default: runs/CONFIG-TIME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue a run that was stopped or killed")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change of the configuration, for example agent.gamma=0.95"
    )
    arguments = parser.parse_intermixed_args(argv)

    console = report_console()
    resume = arguments.resume is not None
    run, config = _old_run(arguments, console) if resume else _new_run(arguments)
    if resume and (run / LAST_FILE).is_file():
        remove_states(run)  # left if the run was killed before it removed them
        console.print(f"{run} is finished; evaluate it again: jaxroute evaluate {run}", highlight=False)
        return 0
    experiment = build_experiment(config)
    if not resume:
        prepare_run_folder(run)
        write_text(run / VERSIONS, json.dumps({"seed": config.training.seed, **versions()}, indent=2) + "\n")
        write_text(run / "config.yaml", config_text(config))
        if experiment.readings:
            facts = [reading.facts() for reading in experiment.readings]
            write_text(run / "data.json", json.dumps(facts, indent=2) + "\n")
    print_notes(console, experiment.notes)
    console.print(f"training on {jax.devices()[0].device_kind}, run in {run}", highlight=False)
    started = time.monotonic()
    params, records = train(config, experiment, run, console, resume)
    trained = time.monotonic()
    save_checkpoint(run, params)
    try:
        results = compare(config, experiment, params, console)
    except KeyboardInterrupt:
        go_on = f"jaxroute train --resume {run}"
        raise KeyboardInterrupt(f"interrupted in the evaluation; go on: {go_on}") from None
    write_evaluation(run / "evaluation.json", results, config.evaluation.seed, experiment.notes)
    learning_curve(run / "learning_curve.png", records, results)
    qos_comparison(run / LAST_FILE, results)
    remove_states(run)
    print_evaluation(console, results)
    seconds = f"training {trained - started:.0f} s, evaluation {time.monotonic() - trained:.0f} s"
    console.print(f"{seconds}; tables, pictures and checkpoint in {run}", highlight=False)
    return 0


def _new_run(arguments: argparse.Namespace) -> tuple[Path, Config]:
    """The folder and the configuration that the arguments specify."""
    seed = [] if arguments.seed is None else [f"training.seed={arguments.seed}"]
    config = load_config(arguments.config, [*arguments.overrides, *seed])
    check_loggers(config.training.loggers)
    name = arguments.config.stem if arguments.config else "default"
    return arguments.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}", config


def _old_run(arguments: argparse.Namespace, console: Console) -> tuple[Path, Config]:
    """The run to continue. Prints a note on packages with other versions, since these may change its results."""
    run: Path = arguments.resume
    if arguments.config or arguments.out or arguments.seed is not None or arguments.overrides:
        raise UserError("--resume RUN continues with the configuration of that run; leave the other arguments out")
    if not (run / "config.yaml").is_file():
        raise UserError(f"--resume {run}: has no config.yaml; give a folder that jaxroute train wrote")
    config = load_saved_config(run / "config.yaml")
    check_loggers(config.training.loggers)
    try:
        begun = dict(json.loads((run / VERSIONS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{run / VERSIONS}: missing or damaged; copy the run again or train anew") from None
    changed = {name: (begun.get(name), now) for name, now in versions().items() if now != begun.get(name)}
    print_notes(console, [f"started with {name} {old}, continues with {new}" for name, (old, new) in changed.items()])
    return run, config


def train(
    config: Config, experiment: Experiment, run: Path, console: Console, resume: bool = False
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains for `training.frames` frames, rounded up to whole chunks, from a linear policy (`agent.start`) or from the
    improved one (`agent.improvement`). Returns the parameters of the greedy policy with the best validation, and the
    logged metrics.

    With `resume` it continues from the last state saved in `run`, or from the beginning if there is none.

    Raises:
        UserError: training diverged, or no saved state can be used.
        Interrupted: a signal came; the state and the parameters after the current chunk have been saved in `run`.
    """
    env_params, hyper, sac = experiment.training_params, experiment.hyperparameters, experiment.sac
    trainer = build_trainer(experiment)
    inputs = jax.random.key(config.training.seed), env_params, hyper
    per_chunk = sac.num_envs * sac.steps_per_chunk
    chunks = -(-config.training.frames // per_chunk)
    summary = jax.jit(partial(summarize, level=experiment.env.metrics))
    validation = _Validation(config, experiment, chunks)
    done, kept = 0, None
    if resume:
        done, kept, damaged = newest_state(run, jax.eval_shape(lambda: _Kept.first(trainer.init(*inputs))))
        print_notes(console, damaged)
        console.print(f"going on from frame {done:,}", highlight=False)
    with (
        MetricsLog(run, config.training.loggers, dotted_values(config), done) as log,
        TrainingStates(run, config.training.checkpoint_seconds, config.training.checkpoints_kept) as states,
        Stop() as stop,
        TrainingProgress(console, chunks * per_chunk, done) as progress,
    ):
        if kept is None:
            kept = _Kept.first(trainer.init(*inputs))
            for params in _starts(config, experiment, kept.state.learner.params, run, progress, stop):
                kept, qos = validation.better(kept.beginning_with(params))
                console.print(f"validated: QoS {qos:.4f}", highlight=False)
            kept = kept.beginning_with(validation.chosen(kept))
        records = log.kept
        earlier = records[-1]["seconds"] if records else 0.0
        started = time.monotonic()
        for chunk in range(done // per_chunk + 1, chunks + 1):
            frames = chunk * per_chunk
            state, metrics = trainer.train_chunk(kept.state, env_params, hyper)
            kept = kept._replace(state=state)
            metrics = jax.device_get(metrics)
            totals = metrics.pop("episode")
            record: dict[str, Any] = {"frames": frames}
            record.update((name, float(value)) for name, value in metrics.items())
            if record["episodes"]:
                episode = jax.device_get(summary(totals))
                record["episode"] = {name: np.asarray(value).tolist() for name, value in episode.items()}
            diverged = state.learner.updates > 0 and not np.isfinite(record["mean_q"] + record["critic_loss"])
            if validation.due(chunk) and not diverged:
                kept, record["validation_qos"] = validation.better(kept)
            record["seconds"] = round(earlier + time.monotonic() - started, 3)
            records.append(log.write(record))
            progress.update(frames, record)
            if diverged:
                raise UserError(f"training diverged before frame {frames}; lower agent.critic_learning_rate")
            if stop:
                states.save(frames, kept)
                save_checkpoint(run, validation.chosen(kept))
                raise stop.interrupted(
                    f"stopped after frame {frames}; go on: jaxroute train --resume {run}; "
                    f"or evaluate what is learned so far: jaxroute evaluate {run}"
                )
            states.offer(frames, kept)
        states.wait()
    print_notes(console, validation.notes(kept, records))
    return jax.device_get(validation.chosen(kept)), records


class _Kept(NamedTuple):
    """What a saved state of a training has."""

    state: TrainState
    best: Any  # network parameters of the best validation
    validation_qos: Any  # float32 [], its mean QoS

    @classmethod
    def first(cls, state: TrainState) -> Self:
        return cls(state, jax.tree.map(jnp.copy, state.learner.params), jnp.float32(-jnp.inf))

    def beginning_with(self, params: Any) -> Self:
        """The same with these network parameters before the first update."""
        own, target = (jax.tree.map(jnp.copy, params) for _ in range(2))
        learner = replace(self.state.learner, params=own, target_params=target)
        return self._replace(state=replace(self.state, learner=learner))


class _Validation:
    """When greedy policies are validated, and which is kept."""

    def __init__(self, config: Config, experiment: Experiment, chunks: int):
        self._network, self._chunks, self._number = experiment.network, chunks, config.training.validations
        decisions = config.training.validation_decisions
        inputs = experiment.env, experiment.training_params, experiment.params_axes
        self._validator = Validator(*inputs, decisions) if decisions else None

    def due(self, chunk: int) -> bool:
        """Whether the policy after this chunk, from 1 on, is validated."""
        number = min(self._number, self._chunks)
        return self._validator is not None and chunk * number // self._chunks > (chunk - 1) * number // self._chunks

    def better(self, kept: _Kept) -> tuple[_Kept, float]:
        """With the present policy if it is better than the best one, and the QoS of the present one."""
        if self._validator is None:
            return kept, float("nan")
        params = kept.state.learner.params
        qos = self._validator.qos(policy_router(self._network, params))
        if qos > kept.validation_qos:
            kept = kept._replace(best=jax.tree.map(jnp.copy, params), validation_qos=jnp.float32(qos))
        return kept, qos

    def chosen(self, kept: _Kept) -> Any:
        """Network parameters: those of the best validation, or the present ones if none was made."""
        return kept.state.learner.params if self._validator is None else kept.best

    def notes(self, kept: _Kept, records: Sequence[dict[str, Any]]) -> list[str]:
        """A warning if the greedy policy is far worse than the sampled one."""
        sampled, best = records[-1]["qos"], float(kept.validation_qos)
        if self._validator is None or best >= _FAR_BELOW * sampled:
            return []
        return [
            f"warning: the greedy policy has a validation QoS of {best:.3f}, far below the {sampled:.3f} of the "
            "sampled policy in training; raise training.start_decisions or training.frames"
        ]


def _starts(
    config: Config, experiment: Experiment, params: Any, run: Path, progress: TrainingProgress, stop: Stop
) -> Iterator[Any]:
    """The network parameters that training may start from: those with the universal router's policy, if asked for, with
    the linear policy that is found, then the improved ones; or, if it starts at random, only `params`.
    """
    training, first = config.training, None
    if training.start == "universal":
        first = universal_weights(expert_features(experiment.env))
        yield with_linear_policy(params, jnp.asarray(first))
    elif not training.start_decisions or not isinstance(experiment.network, RouterNetwork):
        yield params
    if not training.start_decisions or not isinstance(experiment.network, RouterNetwork):
        return

    def report(what: str, simulated: int, decisions: int, qos: float | None = None) -> None:
        progress.search(what, simulated, decisions, qos)
        if stop:
            raise stop.interrupted(f"stopped before the first frame; go on: jaxroute train --resume {run}")

    inputs = experiment.env, experiment.training_params, experiment.params_axes
    with SearchLog(run) as log:

        def searched(simulated: int, qos: float, values: np.ndarray) -> None:
            log.write(simulated, qos, values)
            report("searching a start", simulated, training.start_decisions, qos)

        found = linear_start(*inputs, training.start_decisions, training.seed, searched, first, log.known)
    weights = jnp.asarray(found)
    params = with_linear_policy(params, weights)
    yield params
    if training.improvement_decisions:

        def compared(simulated: int) -> None:
            report("comparing actions", simulated, training.improvement_decisions)

        comparisons = compare_actions(*inputs, weights, training.improvement_decisions, training.seed, compared)
        if comparisons is None:
            progress.say("comparing actions tells too little here; the start stays as it is")
        else:
            yield improve(experiment.network, params, comparisons, training.seed)
