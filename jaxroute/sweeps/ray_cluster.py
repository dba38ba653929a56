"""Batches of a sweep as tasks of a Ray cluster (extra `ray`)."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxroute.errors import UserError
from jaxroute.runs.compilation_cache import keep_compiled_programs
from jaxroute.runs.stopping import Stop
from jaxroute.sweeps.display import SweepDisplay
from jaxroute.sweeps.driver import Execute
from jaxroute.sweeps.plan import Batch, Group
from jaxroute.sweeps.program import Program
from jaxroute.sweeps.results import SweepFolder
from jaxroute.sweeps.runner import run_batch
from jaxroute.sweeps.spec import Spec

RETRIES = 10  # restarts of a task whose worker died; it continues from its last saved state


def check_ray() -> None:
    """Raises `UserError` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray: Ray is not installed; pip install 'jaxroute[ray]'")


def execute_on_ray(
    spec: Spec, groups: list[Group], devices: int, folder: SweepFolder, address: str, stop: Stop
) -> Execute:
    """Runs every batch as a task of the cluster at `address` ("local": a new one on this machine).

    A task has one GPU, or as many CPU `devices` as the sweep has here, so that its results are the same.

    The sweep's folder must be on a file system that all nodes share, because states are saved there.

    Raises:
        UserError: no cluster answers.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster answers ({str(error).splitlines()[0]})") from None
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    settings = {"env_vars": {"JAX_NUM_CPU_DEVICES": str(devices)}}
    task = ray.remote(_task).options(max_retries=RETRIES, runtime_env=settings, **needs)

    def execute(batches: Sequence[Batch], display: SweepDisplay) -> Iterator[tuple[Batch, dict[str, Any]]]:
        shared = {group.number: ray.put(group) for group in groups}
        work = folder.work.absolute()
        waiting = {task.remote(spec, shared[batch.group], devices, batch, work): batch for batch in batches}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
                if stop:
                    raise stop.interrupted("stopped; the same command goes on")
                for one in done:
                    yield waiting.pop(one), ray.get(one)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        finally:
            for left in waiting:
                ray.cancel(left, force=True)

    return execute


def _task(spec: Spec, group: Group, devices: int, batch: Batch, work: Path) -> dict[str, Any]:
    keep_compiled_programs()
    program = Program(group, batch.size, jax.local_devices()[:devices])
    return run_batch(spec, program, batch, work, Stop(), lambda share: None)
