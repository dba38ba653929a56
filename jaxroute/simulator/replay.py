"""Runs one engine on a list of requests from a file, and returns the results as JSON.

SPEC is a JSON file in the format of the recorded vLLM schedules (`config`, `requests` and, if it is not V1, `engine`),
or recorded requests in another format of docs/formats.md, which run on the default engine.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.errors import UserError, require_known
from jaxroute.simulator.block_engine import BlockRequest, run_block_engine
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import LARGE, EngineParams
from jaxroute.simulator.engine_config import engine_from_config
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.presets import PRESETS, defaults_on
from jaxroute.simulator.recorded import Recording, ReplayOutcome, replay_by_jumps
from jaxroute.workload.content import open_content
from jaxroute.workload.files import MOST_TOKENS
from jaxroute.workload.formats import recognise
from jaxroute.workload.record import HASHED_TOKENS
from jaxroute.workload.trace import read_requests

ENGINES = {"V1": "vllm_v1", "V0": "vllm_v0", "orca": "orca"}
"""Disciplines by their names in a file's `engine`, which may also name a version (`presets.PRESETS`)."""

RUN_DEFAULTS = {"max_iterations": 1_000_000, "stall_iterations": 3}
"""Options of a run in addition to the engine's (`engine_config.DEFAULTS`)."""


def load_spec(
    path: Path, *, spread_ticks: bool = False, time_unit: str | None = None, run: int | None = None
) -> dict[str, Any]:
    """Reads SPEC into a dictionary with `config` and `requests`; the options are those of `load_trace`.

    Raises `UserError`.
    """
    content = open_content(path)
    if content.kind != "json" or recognise(content) is not None or not {"requests", "config"} & set(content.keys):
        trace = read_requests(path, contents=True, spread_ticks=spread_ticks, time_unit=time_unit, run=run)
        times = (trace.first_time + trace.times).tolist()
        rows = zip(times, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
        keys = ("arrival_time", "prompt_len", "output_len")
        requests: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
        for request, ids in zip(requests, trace.hash_ids or (), strict=False):
            request["segments"] = _segments(ids, request["prompt_len"])
        return {"config": {}, "requests": requests}
    if spread_ticks or time_unit is not None or run is not None:
        raise UserError(f"{path}: spread_ticks, time_unit and run are for recorded requests; leave them out")
    spec, *more = (record for _, record in content.objects())
    if more:
        raise UserError(f"{path}: holds {1 + len(more)} JSON objects; a spec is one, with config and requests")
    if not isinstance(spec.get("requests"), list):
        raise UserError(f"{path}: key requests: a list of requests is missing")
    if not isinstance(spec.setdefault("config", {}), dict):
        raise UserError(f"{path}: key config: must be a mapping of engine options")
    return spec


def _segments(hash_ids: Sequence[int], prompt: int) -> list[list[int]]:
    """A prompt of this many tokens as segments [id, tokens]."""
    *full, last = hash_ids
    return [*([identity, HASHED_TOKENS] for identity in full), [last, prompt - HASHED_TOKENS * len(full)]]


def engine_and_recording(spec: Mapping[str, Any], where: str) -> tuple[EngineParams, Recording, np.ndarray, np.ndarray]:
    """The engine; the requests in order of arrival; their ids (int [R], positions in the list); and time origins.

    Equal arrivals are ordered by id. The origins are float64 [R] in seconds: the times of the outcome are relative to
    them. They are the arrival times, or 0 with arrivals by iteration.
    Raises `UserError`, which names the request.
    """
    config, requests = spec["config"], spec["requests"]
    name = require_known(spec.get("engine", "V1"), [*ENGINES, *PRESETS], "engine", f"{where}: key engine: ")
    if name in PRESETS:
        preset, gpu = PRESETS[name], spec.get("gpu")
        if gpu is not None:
            require_known(gpu, GPUS, "GPU", f"{where}: key gpu: ")
        discipline = preset.discipline
        config = {**defaults_on(preset, gpu), **config}
    elif "gpu" in spec:
        raise UserError(f"{where}: key gpu: it is for an engine of {', '.join(PRESETS)}, not {name}; leave it out")
    else:
        discipline = ENGINES[name]
    engine = engine_from_config(config, f"{where}: config", tuple(RUN_DEFAULTS), discipline)
    run = {key: config.get(key, default) for key, default in RUN_DEFAULTS.items()}
    for key, value in run.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGE:
            raise UserError(f"{where}: config: {key} must be a whole number of at least 1, not {value!r}")
    if not requests:
        raise UserError(f"{where}: key requests: there is no request")
    kinds = {key for request in requests if isinstance(request, dict) for key in request} & {
        "arrival_time",
        "arrival_iteration",
    }
    if len(kinds) != 1:
        raise UserError(f"{where}: all requests need arrival_time, or all need arrival_iteration, not both")
    kind = kinds.pop()
    for index, request in enumerate(requests):
        _check_request(request, kind, f"{where}: requests[{index}]")
    by_iteration = kind == "arrival_iteration"
    ids = np.argsort([request[kind] for request in requests], kind="stable")
    requests = [requests[index] for index in ids]
    arrivals = np.asarray([request[kind] for request in requests])
    times = np.zeros(len(requests)) if by_iteration else arrivals.astype(np.float64)
    recording = Recording(
        gap=jnp.asarray(np.diff(times, prepend=0.0), float),
        arrival_iteration=jnp.asarray(arrivals if by_iteration else times * 0, jnp.int32),
        prompt_tokens=jnp.asarray([request["prompt_len"] for request in requests], jnp.int32),
        output_tokens=jnp.asarray([request["output_len"] for request in requests], jnp.int32),
        stop_token=jnp.asarray([request.get("max_tokens", 0) > request["output_len"] for request in requests]),
        count=jnp.int32(len(requests)),
        by_iteration=jnp.bool_(by_iteration),
        max_iterations=jnp.int32(run["max_iterations"]),
        stall_iterations=jnp.int32(run["stall_iterations"]),
    )
    return engine, recording, ids, times


def never_served(spec: Mapping[str, Any], where: str = "spec") -> dict[int, str]:
    """The requests (positions in the list) that the engine can never finish, each with the reason."""
    engine, recording, ids, _ = engine_and_recording(spec, where)
    prompts, outputs = np.asarray(recording.prompt_tokens), np.asarray(recording.output_tokens)
    served = np.asarray(rules(engine).can_serve(recording.prompt_tokens, recording.output_tokens, engine))
    longest, blocks, size = (int(value) for value in (engine.max_model_len, engine.usable_blocks, engine.block_size))
    found = {}
    for at in np.flatnonzero(~served):
        prompt, output = int(prompts[at]), int(outputs[at])
        if prompt >= longest:
            why = f"({prompt:,} prompt tokens) exceeds max_model_len {longest:,}"
        elif -(-min(prompt + output, longest) // size) > blocks:
            why = f"({prompt:,} + {output:,} tokens) exceeds the KV cache of {blocks:,} blocks of {size}"
        else:
            why = f"({prompt:,} + {output:,} tokens) exceeds what one iteration or the KV cache can take"
        found[int(ids[at])] = why
    return dict(sorted(found.items()))


def _check_request(request: Any, kind: str, where: str) -> None:
    for key in (kind, "prompt_len", "output_len"):
        value: Any = request.get(key) if isinstance(request, dict) else None
        whole = key != "arrival_time"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise UserError(f"{where}: {key} must be a {'whole ' if whole else ''}number, not {value!r}")
        if value < (0 if key == kind else 1) or (whole and value > MOST_TOKENS):
            raise UserError(f"{where}: {key} is out of range: {value!r}")
    most = request.get("max_tokens", request["output_len"])
    if isinstance(most, bool) or not isinstance(most, int) or most < request["output_len"]:
        raise UserError(f"{where}: max_tokens must be a whole number of at least output_len, not {most!r}")
    if "output_segment" in request and not _is_count(request["output_segment"]):
        raise UserError(f"{where}: output_segment must be a number from 0, not {request['output_segment']!r}")
    segments = request.get("segments", [[0, request["prompt_len"]]])
    if not isinstance(segments, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in segments
    ):
        raise UserError(f"{where}: segments must be a list of [id, tokens], whole numbers from 0, not {segments!r}")
    if sum(tokens for _, tokens in segments) != request["prompt_len"]:
        total = sum(tokens for _, tokens in segments)
        raise UserError(f"{where}: segments have {total} tokens, but prompt_len is {request['prompt_len']}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def result(outcome: ReplayOutcome, ids: np.ndarray, times: np.ndarray, engine: EngineParams) -> dict[str, Any]:
    """The JSON of a finished run: absolute times in seconds, null for events that did not happen."""

    def absolute(since: jax.Array) -> list[float | None]:
        values = np.asarray(since, np.float64) + times
        return [float(value) if math.isfinite(value) else None for value in values]

    first, finish = absolute(outcome.first_token), absolute(outcome.finish)
    joined = int(outcome.joined)
    last_joined = float(times[joined - 1]) if joined else 0.0
    preemptions, emitted = np.asarray(outcome.preemptions).tolist(), np.asarray(outcome.emitted).tolist()
    ignored = outcome.ignored_iteration if rules(engine).ignores else None
    status = "ok" if outcome.drained else "stalled" if outcome.stalled else "max_iterations"
    return {
        "status": status,
        "per_request": {
            str(ids[position]): {
                "first_token_time": first[position],
                "finish_time": finish[position],
                "preemptions": preemptions[position],
                "emitted": emitted[position],
                **({} if ignored is None else _v0_end(int(ignored[position]), finish[position])),
            }
            for position in np.argsort(ids)
        },
        "summary": {
            "iterations": int(outcome.work.iterations),
            "preemptions": sum(preemptions),
            "end_time": float(outcome.end) + last_joined,
        },
    }


def _v0_end(ignored_iteration: int, finish: float | None) -> dict[str, Any]:
    """How a request ended under vLLM's V0, with the names of the recorded schedules."""
    if ignored_iteration >= 0:
        return {"ignored_iter": ignored_iteration, "finish_reason": "FINISHED_IGNORED"}
    return {"ignored_iter": None, "finish_reason": None if finish is None else "FINISHED_LENGTH_CAPPED"}


def _replay_by_blocks(
    spec: Mapping[str, Any], engine: EngineParams, recording: Recording, ids: np.ndarray
) -> dict[str, Any]:
    """The JSON of a run with prefix caching, which depends on the content of the prompts."""
    by_iteration = bool(recording.by_iteration)
    requests = []
    for index in ids.tolist():
        request = spec["requests"][index]
        prompt, output = request["prompt_len"], request["output_len"]
        segments = [(identity, tokens) for identity, tokens in request.get("segments", [(("prompt", index), prompt)])]
        content = [*segments, (request.get("output_segment", ("output", index)), output)]
        arrival = request["arrival_iteration" if by_iteration else "arrival_time"]
        requests.append(BlockRequest(arrival, prompt, output, request.get("max_tokens", output), content))
    limits = int(recording.max_iterations), int(recording.stall_iterations)
    run = run_block_engine(engine, requests, by_iteration, *limits)
    return {
        "status": run.status,
        "per_request": {
            str(ids[position]): {
                "first_token_time": requests[position].first_token_time,
                "finish_time": requests[position].finish_time,
                "preemptions": requests[position].preemptions,
                "emitted": requests[position].generated,
                "cached_tokens": requests[position].cached,
            }
            for position in np.argsort(ids)
        },
        "summary": {
            "iterations": run.iterations,
            "preemptions": sum(request.preemptions for request in requests),
            "end_time": run.end,
            "cached_tokens": sum(request.cached for request in requests),
        },
    }


def replay(spec: Mapping[str, Any], where: str = "spec") -> dict[str, Any]:
    """Runs a spec (see `load_spec`); returns the JSON that the command writes.

    With prefix caching, the engine runs block by block (`block_engine`); without, in JAX's current precision.
    """
    engine, recording, ids, times = engine_and_recording(spec, where)
    if engine.enable_prefix_caching:
        return _replay_by_blocks(spec, engine, recording, ids)
    outcome = jax.jit(replay_by_jumps)(recording, engine)
    return result(jax.device_get(outcome), ids, times, engine)
