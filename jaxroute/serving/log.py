"""The record of a front end: for `jaxroute calibrate` a file for each expert, and one of the whole for `timeline`."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxroute.errors import UserError
from jaxroute.serving.call import Call
from jaxroute.serving.cluster import Cluster
from jaxroute.simulator.engine import EngineParams


class Log:
    """LOG.NAME.jsonl for each expert has a line for each request that was sent there, in a format of docs/formats.md.

    LOG.jsonl has what concerns all of them: at each start the cluster and its engines, and then the engines that were
    measured and the requests that no expert got. `timelines.live` reads it. No text of any request is in these files.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        """The files are appended to. Raises `UserError` if one cannot be written."""
        self.path = path if path.suffix else path.with_suffix(".jsonl")
        self.paths = [path.with_name(f"{path.stem}.{_file_name(name)}{self.path.suffix}") for name in names]
        try:
            self._all = self.path.open("a", encoding="utf-8", buffering=1)
            self._files: list[TextIO] = [one.open("a", encoding="utf-8", buffering=1) for one in self.paths]
        except OSError as error:
            raise UserError(f"--record {path}: cannot be written ({error.strerror}); name another file") from None
        # Times are seconds since 1970, on a clock that never goes back.
        self._offset = time.time() - time.monotonic()
        self._names, self._run, self._number = list(names), f"{time.time_ns() // 1_000_000:x}", 0

    def begin(self, router: str, cluster: Cluster, engines: EngineParams, latency_limit: float) -> None:
        """Notes the cluster at the start; engines that are to be measured follow."""
        experts = [
            {
                "name": expert.name,
                "file": path.name,
                "engine": _options(engines, number) if expert.measured_with is None else None,
            }
            for number, (expert, path) in enumerate(zip(cluster.experts, self.paths, strict=True))
        ]
        self._note(router=router, slots=cluster.slots, latency_limit=latency_limit, experts=experts)

    def measured(self, expert: int, engines: EngineParams) -> None:
        """Notes the engine of an expert; `engines` have fields [N]."""
        self._note(measured=self._names[expert], engine=_options(engines, expert))

    def dropped(self, call: Call, reason: str) -> None:
        """Notes a request that no expert got."""
        self._note(
            arrival_time=round(self._offset + call.arrival, 6), prompt_tokens=call.prompt_estimate, dropped=reason
        )

    def _note(self, **values: Any) -> None:
        self._all.write(json.dumps({"run": self._run, **values}) + "\n")

    def ended(self, expert: int, outcome: str, call: Call, first: float, finish: float, met: bool) -> None:
        """Adds a request. One that did not complete has 0 completion tokens, which `calibrate` leaves out."""
        done = outcome == "completed" and call.tokens > 0
        self._number += 1
        line = {
            "request_id": f"{self._run}-{self._number}",
            "arrival_time": round(self._offset + call.arrival, 6),
            "sent_time": round(self._offset + call.sent, 6),
            "first_token_time": round(self._offset + first, 6),
            "finish_time": round(self._offset + finish, 6),
            "prompt_tokens": call.prompt_tokens or call.prompt_estimate,
            "completion_tokens": call.tokens if done else 0,
            "outcome": outcome,
            "streamed_tokens": call.tokens,
            "predicted_tokens": int(call.predicted_lengths[expert]),
            "predicted_score": round(float(call.predicted_scores[expert]), 4),
            "latency_limit": round(call.limit.of(max(call.tokens, 1)), 6),
            "met": bool(met),
        }
        self._files[expert].write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Closes the files."""
        for file in (self._all, *self._files):
            file.close()


def _options(engines: EngineParams, expert: int) -> dict[str, Any]:
    """The traced options of an engine by the names of `EngineParams`; the latency is that of `latency_model`."""
    latency = [float(np.asarray(getattr(engines.latency, one.name))[expert]) for one in _fields(engines.latency)]
    values = {one.name: getattr(engines, one.name) for one in _fields(engines) if one.name != "latency"}
    traced = {name: np.asarray(value)[expert].item() for name, value in values.items() if np.ndim(value)}
    return {"latency": latency, **traced}


def _fields(tree: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(tree)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
