"""Prepares recorded data before training: halves of traces, loads, and predictors of real text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from benchmarks.paper.plan import TEXT_CLUSTER, TEXT_MODELS
from jaxroute.commands import predict
from jaxroute.config.build import build_experiment
from jaxroute.config.loader import load_config
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import run_episodes
from jaxroute.files import write_text
from jaxroute.routers import make_router
from jaxroute.workload import load_trace

VIOLATIONS = 0.30
"""Share of requests for which a heuristic misses the latency limit at the chosen load."""

AZURE = {"azure_conv": "azure_llm_2023_conv.csv", "azure_code": "azure_llm_2023_code.csv"}
TEXT = "alpacaeval_mix_train.jsonl"


def missing_data(need: str, data: Path) -> str | None:
    """The file that `need` requires and `data` lacks, or None."""
    name = AZURE.get(need, TEXT)
    return None if (data / name).is_file() else str(data / name)


def prepare(need: str, out: Path, data: Path) -> dict[str, str]:
    """Placeholders of overrides -> their values. The files are made once, in `out/data`."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{need}.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    values = _text(folder, data / TEXT) if need == "text" else _azure(need, folder, data / AZURE[need])
    write_text(record, json.dumps(values, indent=1) + "\n")
    return values


def _azure(need: str, folder: Path, path: Path) -> dict[str, str]:
    """The first half of the trace for training, the second half for evaluation, and the rate scale at which Round-Robin
    misses the limit for `VIOLATIONS` of the second half, with requests of the frozen generator."""
    trace = load_trace(path)
    times, middle = trace.times, len(trace.times) // 2
    values = {}
    for half, rows in (("first", slice(0, middle)), ("second", slice(middle, None))):
        values[f"{need}_{half}"] = str((folder / f"{need}_{half}.csv").absolute())
        columns = zip(times[rows] - times[rows][0], trace.prompt_tokens[rows], trace.output_tokens[rows], strict=True)
        lines = [f"{time:.6f},{prompt},{output}" for time, prompt, output in columns]
        write_text(Path(values[f"{need}_{half}"]), "\n".join(["arrival_time,prompt_len,output_len", *lines]) + "\n")
    overrides = ["workload.arrivals.kind=trace", f"workload.arrivals.path={values[f'{need}_second']}"]
    scale = load_of(VIOLATIONS, "round_robin", overrides, "workload.arrivals.rate_scale")
    return {**values, f"{need}_scale": f"{scale:.4g}"}


def _text(folder: Path, path: Path) -> dict[str, str]:
    """Predictions of score and length for the prompts, learned from the training part; a file for each part; and the
    rate at which BERT Router misses the limit for `VIOLATIONS` of the held-out prompts."""
    values = {f"text_{part}": str((folder / f"text_{part}.jsonl").absolute()) for part in ("train", "holdout")}
    model = folder / "predictors"
    if not model.exists():
        command = ["train", str(path), "--experts", ",".join(TEXT_MODELS), "--score", "bertscore", "--out", str(model)]
        _predict(command)
    for part in ("train", "holdout"):
        _predict(["apply", str(model), str(path), "--split", part, "--out", values[f"text_{part}"]])
    overrides = [*TEXT_CLUSTER, f"workload.requests.path={values['text_holdout']}"]
    return {**values, "text_rate": f"{load_of(VIOLATIONS, 'bert_router', overrides, 'workload.arrivals.rate'):.4g}"}


def _predict(arguments: list[str]) -> None:
    if predict.main(arguments):
        raise UserError(f"jaxroute predict {' '.join(arguments)}: failed")


def load_of(violations: float, router: str, overrides: list[str], key: str) -> float:
    """The value of the configuration's `key` at which `router` misses the limit for this share of requests."""
    experiment = build_experiment(
        load_config(None, [*overrides, "environment.episode_length=2000", "environment.penalty=off"])
    )
    env = dataclasses.replace(experiment.env, metrics="histogram")
    policies = [make_router(router, env)]
    keys = jax.random.split(jax.random.key(30), 8)
    program = jax.jit(lambda params: run_episodes(env, policies, jax.numpy.int32(0), keys, params))
    name = key.rpartition(".")[2]

    def missed(value: float) -> float:
        workload = experiment.params.workload
        arrivals = dataclasses.replace(workload.arrivals, **{name: jax.numpy.asarray(value, float)})
        params = experiment.params.replace(workload=dataclasses.replace(workload, arrivals=arrivals))
        return float(np.mean(program(params)["violation_rate"]))

    low, high = 0.05, 20.0
    for _ in range(12):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if missed(middle) < violations else (low, middle)
    return float(np.sqrt(low * high))
