"""Destinations of metrics beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (docs/logging.md)."""

import importlib
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jaxroute.errors import UserError
from jaxroute.files import write_text


class Sink(AbstractContextManager["Sink"]):
    """Receives the metrics of a run. Use it as a context manager; on an exception, the run is marked as failed.

    It is created from the run's folder, the configuration by dotted keys, and the number of frames that a resumed run
    has already done. Its creation raises `UserError` if its package or its server cannot be used.
    """

    @abstractmethod
    def write(self, scalars: dict[str, float], frames: int) -> None:
        """Logs finite numbers by name after `frames` frames, which increase from call to call."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises `UserError` if the package of a logger is not installed."""
    for name in names:
        if name != "tensorboard":
            _package(name)


class TensorBoardSink(Sink):
    """Writes event files into the folder `tensorboard` of the run."""

    def __init__(self, run: Path, config: dict[str, Any], frames: int):
        folder = run / "tensorboard"
        # File names begin with the second of their creation, and are read in order. The suffix distinguishes and orders
        # files of one second. The purge hides points that a killed run logged after `frames`.
        suffix = f".{len(list(folder.glob('*'))):04d}"
        self._writer = SummaryWriter(str(folder), purge_step=frames + 1, flush_secs=1, filename_suffix=suffix)

    def __exit__(self, *error: Any) -> None:
        self._writer.close()

    def write(self, scalars: dict[str, float], frames: int) -> None:
        """A point of each scalar's curve, at this many frames."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, frames)


class WandbSink(Sink):
    """A run of Weights & Biases with the folder's name; its files are in the folder or in `WANDB_DIR`."""

    def __init__(self, run: Path, config: dict[str, Any], frames: int):
        wandb = _package("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "jaxroute"),
                dir=os.environ.get("WANDB_DIR", str(run)),
                name=run.resolve().name,
                config=config,
                id=_saved_id(run, "wandb"),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise _failed("wandb", error, "log in with `wandb login`, or set WANDB_MODE=offline") from None
        _save_id(run, "wandb", self._run.id)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._run.finish(exit_code=int(kind is not None))

    def write(self, scalars: dict[str, float], frames: int) -> None:
        """Logs the scalars, except those of steps that the server received before a kill."""
        # Such steps cannot be logged again; their values would be the same.
        if frames >= self._run.starting_step:
            self._run.log(scalars, step=frames, commit=True)


class MlflowSink(Sink):
    """A run of MLflow with the folder's name, at `MLFLOW_TRACKING_URI` or in a database in the folder.

    It uses a database because recent versions of MLflow refuse to write plain files, and a client because
    `mlflow.set_tracking_uri` would set the URI for the whole process and its children.
    """

    def __init__(self, run: Path, config: dict[str, Any], frames: int):
        mlflow = _package("mlflow")
        self._error: type[Exception] = mlflow.exceptions.MlflowException
        self._lost = False
        self._entities = mlflow.entities
        local = f"sqlite:///{(run / 'mlflow.db').absolute()}"
        try:
            self._client = mlflow.MlflowClient(mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else local)
            saved = _saved_id(run, "mlflow")
            self._id = saved or self._create(run, config)
            # As for Weights & Biases, points that are logged already are not logged again.
            history = self._client.get_metric_history(self._id, "frames") if saved else []
            self._logged = max((metric.step for metric in history), default=0)
            if saved:
                self._client.update_run(saved, status="RUNNING")
        except self._error as error:
            raise _failed("mlflow", error, "check MLFLOW_TRACKING_URI") from None

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._try(self._client.set_terminated, self._id, status)

    def write(self, scalars: dict[str, float], frames: int) -> None:
        """As of the other sinks; what the server has from before a kill is left out."""
        if frames > self._logged:
            now = int(time.time() * 1000)
            metrics = [self._entities.Metric(name, value, now, frames) for name, value in scalars.items()]
            self._try(self._client.log_batch, self._id, metrics)

    def _create(self, run: Path, config: dict[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxroute")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        identity = self._client.create_run(experiment_id, run_name=run.resolve().name).info.run_id
        self._client.log_batch(identity, params=[self._entities.Param(key, str(item)) for key, item in config.items()])
        _save_id(run, "mlflow", identity)
        return identity

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Calls a server. If it does not answer, logging there ends, but not the training."""
        if self._lost:
            return
        try:
            call(*arguments)
        except self._error as error:
            self._lost = True
            print(f"note: {_failed('mlflow', error, 'nothing more of this run is logged there')}", file=sys.stderr)


SINKS: dict[str, Callable[[Path, dict[str, Any], int], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def _package(name: str) -> Any:
    try:
        package = importlib.import_module(name)
        if package.__file__ is None:  # a folder of that name in the current directory, which wandb creates
            raise ImportError(f"No module named '{name}'")
    except ImportError as error:
        raise UserError(
            f"training.loggers: {name}: cannot be imported ({error}); pip install 'jaxroute[{name}]', or leave it out"
        ) from None
    return package


def _failed(name: str, error: Exception, remedy: str) -> UserError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"training.loggers: {name}: {reason}; {remedy}")


def _saved_id(run: Path, name: str) -> str | None:
    """The identifier of the run at the service `name`, if it has one."""
    path = run / f"{name}_run_id"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _save_id(run: Path, name: str, identity: str) -> None:
    write_text(run / f"{name}_run_id", f"{identity}\n")
