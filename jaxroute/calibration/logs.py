"""Reads request logs of real servers: the formats of `jaxroute.workload.trace` that have the times of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.simulator.engine_config import BLOCK_SIZE
from jaxroute.workload.content import open_content
from jaxroute.workload.files import names, number
from jaxroute.workload.reading import Reading
from jaxroute.workload.trace import read_requests

FEWEST = 20
"""Minimum number of requests, for half a dozen parameters and errors on requests that were not fitted."""

USUAL = {"ttft": (1e-4, 1000.0), "tpot": (2e-4, 2.0)}
"""Medians in seconds beyond which the unit of the times is probably another one."""


@dataclass(frozen=True)
class ServerLog:
    """R requests in order of arrival. Times are float64 [R], s since the first arrival."""

    path: Path
    ids: np.ndarray  # int64 [R], from the log, or the position
    arrival: np.ndarray
    first_token: np.ndarray
    finish: np.ndarray
    prompt_tokens: np.ndarray  # int32 [R]
    output_tokens: np.ndarray  # int32 [R]
    shared_tokens: np.ndarray | None  # int32 [R], leading tokens that an earlier prompt shares
    series: dict[str, np.ndarray] | None = None  # t (s), running, waiting (requests), if recorded
    reading: Reading | None = None  # what was read

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a request, prompt and output."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def latencies(self, first_token: np.ndarray, finish: np.ndarray) -> dict[str, np.ndarray]:
        """ttft, tpot (s per token after the first; nan for one-token requests) and e2e, each [R], s."""
        gaps = self.output_tokens - 1
        tpot = np.where(gaps > 0, (finish - first_token) / np.maximum(gaps, 1), np.nan)
        return {"ttft": first_token - self.arrival, "tpot": tpot, "e2e": finish - self.arrival}

    @property
    def measured(self) -> dict[str, np.ndarray]:
        """The log's own latencies, as `latencies` gives them."""
        return self.latencies(self.first_token, self.finish)


def load_log(path: str | Path, *, time_unit: str | None = None, run: int | None = None) -> ServerLog:
    """Reads a log of any format in docs/formats.md that has the times of tokens; options as for `load_trace`.

    A file NAME_timeseries.csv beside NAME.jsonl is read too. Raises `UserError`.
    """
    path = Path(path)
    found = read_requests(path, timed=True, time_unit=time_unit, run=run)
    if len(found.times) < FEWEST:
        raise UserError(f"{path}: too few requests to calibrate on, {len(found.times)}; give {FEWEST} or more")
    series = _series(path)
    log = ServerLog(
        path=path,
        ids=_request_ids(found.identities),
        arrival=found.times,
        first_token=found.first_token,
        finish=found.finish,
        prompt_tokens=found.prompt_tokens,
        output_tokens=found.output_tokens,
        shared_tokens=found.shared_tokens,
        series=None if series is None else {**series, "t": series["t"] - found.first_time},
    )
    unlikely = []
    for name, values in log.measured.items():
        median = float(np.nanmedian(values)) if np.isfinite(values).any() else np.nan
        low, high = USUAL.get(name, (0.0, np.inf))
        if not np.isnan(median) and not low <= median <= high:
            unlikely.append(f"the median {name} is {median:.3g} s; check the unit of its times")
    return replace(log, reading=replace(found.reading, warnings=(*found.reading.warnings, *unlikely)))


def shared_segments(log: ServerLog) -> list[list[list[int]]]:
    """Each prompt as segments [id, tokens] (`jaxroute replay`), so that it shares what the log says.

    The log says how many tokens, and not with whom: it is the latest earlier prompt that the shared blocks are all of,
    as in a conversation, or else the latest one that is as long.
    """
    prompts = log.prompt_tokens
    full, kept = (tokens // BLOCK_SIZE * BLOCK_SIZE for tokens in (prompts, prompts - 1))
    found: list[list[list[int]]] = []
    for index, prompt in enumerate(prompts.tolist()):
        shared = 0 if log.shared_tokens is None else min(int(log.shared_tokens[index]), prompt - 1)
        earlier = np.flatnonzero(prompts[:index] >= shared)
        whole = earlier[(full[earlier] == shared) | (kept[earlier] == shared)]
        own: list[list[int]] = []
        if shared and len(earlier):
            left = shared
            for identity, tokens in found[int((whole if len(whole) else earlier)[-1])]:
                if left > 0:
                    own.append([identity, min(tokens, left)])
                    left -= tokens
        begun = sum(tokens for _, tokens in own)
        found.append([*own, [index, prompt - begun]])
    return found


def _request_ids(identities: Sequence[Any]) -> np.ndarray:
    """The numbers in the ids of the requests, or their positions if not every id ends in one."""
    digits = [str(value).rsplit("-", 1)[-1] for value in identities]
    numbered = all(text.isascii() and text.isdigit() and len(text) < 18 for text in digits)
    return np.asarray([int(text) for text in digits] if numbered else range(len(digits)), np.int64)


def _series(path: Path) -> dict[str, np.ndarray] | None:
    """The columns t, running and waiting of the file beside the log, if it exists."""
    beside = path.with_name(f"{path.stem}_timeseries.csv")
    if not beside.is_file():
        return None
    wanted = ("t", "running", "waiting")
    content = open_content(beside)
    missing = [name for name in wanted if name not in content.keys]
    if missing:
        raise content.head.error(f"no column {names(missing)}; it has {names(content.keys)}")
    rows = [
        [number(place, name, value) for name, value in zip(wanted, values, strict=True)]
        for place, values in content.rows(wanted)
    ]
    return dict(zip(wanted, np.asarray(rows, np.float64).reshape(-1, 3).T, strict=True))
