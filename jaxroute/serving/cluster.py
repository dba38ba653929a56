"""The file that describes a cluster of real servers: docs/serve.md has its format."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jaxroute.environment.scenarios import ENGINE_KEYS, expert_engine, mapping, positive, read_cluster, whole
from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import engine_from_config, stack_engines

KEYS = ("experts", "model", "latency_limit", "token_scale", "slots")
EXPERT_KEYS = ("name", "url", "model", "mean_score", "profile", "latency", "kv_blocks", "api_key_env")

MODEL = "jaxroute"
"""The model that clients name, unless the file has another name for it."""

MEAN_SCORE = 0.7
"""The score of an expert without one; what counts is the difference between experts."""

SLOTS = 256
"""Requests that an expert can hold, running and waiting, unless the file has another number: vLLM's max_num_seqs."""


AUTO = "auto"
"""The profile of a server that is measured (`measure`)."""


@dataclass
class Expert:
    """A server."""

    name: str
    url: str  # without the /v1 of the API, and without a slash at its end
    model: str  # the server's name of its model; empty until the server has said it
    mean_score: float
    api_key: str | None = None  # never logged
    measured_with: dict[str, Any] | None = None  # known options of an engine that is to be measured; None: it is known

    @property
    def known(self) -> bool:
        """Whether its model and engine are known."""
        return bool(self.model) and self.measured_with is None


@dataclass(frozen=True)
class Cluster:
    """Servers behind one front end. Limits that are None are those of the router's run, or the defaults."""

    experts: tuple[Expert, ...]
    engines: EngineParams  # each field [N]
    model: str
    slots: int
    latency_limit: float | None  # s per output token
    token_scale: float | None


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster's file. Raises `UserError`, with file, expert and key."""
    tree, listed = read_cluster(path, KEYS)
    experts, engines = [], []
    for index, entry in enumerate(listed):
        where = f"experts[{index}]"
        own = mapping(path, entry, where, (*EXPERT_KEYS, *ENGINE_KEYS))
        experts.append(_expert(path, where, own, index))
        engines.append(_engine(path, where, own, experts[-1]))
    names = [expert.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: experts: the name {name!r} occurs twice; give each its own")
    slots = whole(path, "slots", tree.get("slots", SLOTS))
    limit, scale = (positive(path, key, tree[key]) if key in tree else None for key in ("latency_limit", "token_scale"))
    model = _text(path, "model", tree.get("model", MODEL))
    stacked = stack_engines([as_seen(engine) for engine in engines], f"{path}: experts")
    return Cluster(tuple(experts), stacked, model, slots, limit, scale)


def require_known_experts(cluster: Cluster) -> None:
    """Raises `UserError` for an expert without a model or an engine, where nothing is measured."""
    for expert in cluster.experts:
        if not expert.known:
            raise UserError(f"expert {expert.name}: give its model, and profile or latency; nothing is measured here")


def as_seen(engine: EngineParams) -> EngineParams:
    """The engine as the ledger sees it: of cached prefixes and of a batch in flight, streams of tokens show nothing."""
    return engine.replace(
        enable_prefix_caching=False, async_scheduling=False, unhashed_first=True, threshold_when_alone=True
    )


def _engine(path: Path, where: str, own: dict[str, Any], expert: Expert) -> EngineParams:
    """The engine of an expert; of one that is to be measured, a stand-in until then."""
    if "latency" in own or own.get("profile", AUTO) != AUTO:
        return expert_engine(path, where, own)
    known = {key: own[key] for key in ENGINE_KEYS if key in own}
    if "kv_blocks" in own:
        raise UserError(f"{path}: {where}: kv_blocks needs latency; leave it out, the server says it")
    expert.measured_with = known
    return engine_from_config(known, f"{path}: {where}")


def _expert(path: Path, where: str, own: dict[str, Any], index: int) -> Expert:
    if "url" not in own:
        raise UserError(f"{path}: {where}: url is missing")
    name = _text(path, f"{where}: name", own.get("name", f"expert{index}"))
    score = positive(path, f"{where}: mean_score", own.get("mean_score", MEAN_SCORE))
    if score > 1:
        raise UserError(f"{path}: {where}: mean_score must be at most 1, not {score:g}")
    key = None
    if "api_key_env" in own:
        variable = _text(path, f"{where}: api_key_env", own["api_key_env"])
        key = os.environ.get(variable)
        if not key:
            raise UserError(f"{path}: {where}: api_key_env: the environment variable {variable} is not set")
    model = _text(path, f"{where}: model", own["model"]) if "model" in own else ""
    return Expert(name, _url(path, f"{where}: url", own["url"]), model, score, key)


def _url(path: Path, key: str, value: Any) -> str:
    text = _text(path, key, value)
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        raise UserError(f"{path}: {key} must be like http://host:8000, not {text!r}")
    return text.rstrip("/").removesuffix("/v1")


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {key} must be a text, not {value!r}")
    return value.strip()
