"""The registered environments of the package, each with one line on its purpose."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxroute.environment.disturbances import FAILED, Disturbances
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.random_clusters import random_environment
from jaxroute.environment.registry import (
    SCENARIOS,
    environment_of,
    frozen_workload,
    make_params,
    params_of,
    register,
)
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, require_known
from jaxroute.files import read_yaml
from jaxroute.simulator.catalogue import load_profile
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import engine_from_config, stack_engines
from jaxroute.simulator.profiles import EXPERTS
from jaxroute.workload.arrivals import Arrivals, MarkovArrivals, PoissonArrivals, TraceArrivals
from jaxroute.workload.prefixes import PIECES, ConversationRequests, DocumentRequests, PrefixRequests, Tokens
from jaxroute.workload.requests import FrozenRequests
from jaxroute.workload.trace import load_trace
from jaxroute.workload.trace_lengths import AZURE_CONVERSATION, MOONCAKE_CONVERSATION, Lengths
from jaxroute.workload.workload import Workload

THREE, SIX = SCENARIOS["paper-3"], SCENARIOS["paper-6"]


REPLICAS = ("alpaca-native",) * 3
"""Experts of the environments in which prompts share prefixes: one model on three servers."""

EXPIRY = 120.0
"""s for which a router counts on what it sent: the default of Dynamo's router without events of the engines."""


OF_EXPERTS = ("experts", "profile", "kv_cache_tokens", "discipline", "max_model_len", "engine")
"""Options that are arguments of `make_params`; all others are fields of the environment."""


def _of_experts(
    arrivals: Arrivals,
    options: dict[str, Any],
    experts: Sequence[str] = THREE,
    profile: str | Sequence[str] = "paper",
    latency_limit: float = 0.030,
    middle: dict[str, float] | None = None,
    lengths: Lengths | None = None,
    engine: dict[str, Any] | None = None,
    **defaults: Any,
) -> tuple[RoutingEnvironment, EnvParams]:
    """Experts of `EXPERTS` with requests of the frozen generator; `options` override the other arguments.

    `middle` are factors of the first expert in the middle third of an episode, with the names of `Disturbances`.
    `lengths` take the place of the generator's, and `engine` has further arguments of `make_params`.
    """
    chosen: dict[str, Any] = {"experts": experts, "profile": profile, **(engine or {})}
    chosen.update((key, options[key]) for key in OF_EXPERTS if key in options)
    experts = chosen["experts"]
    others = {key: value for key, value in options.items() if key not in OF_EXPERTS}
    env = environment_of(len(experts), others, **defaults)
    params = make_params(**chosen, workload=frozen_workload(experts, arrivals, lengths), latency_limit=latency_limit)
    return env, params if middle is None else params.replace(disturbances=_middle(env, middle))


def _scenario(
    name: str,
    description: str,
    arrivals: Callable[[], Arrivals] = lambda: PoissonArrivals.create(3.0),
    experts: Sequence[str] = THREE,
    **own: Any,
) -> None:
    SCENARIOS[name] = tuple(experts)
    register(name, lambda **options: _of_experts(arrivals(), options, experts, **own), description)


def _with_prefixes(
    name: str,
    description: str,
    arrivals: Callable[[], Arrivals],
    requests: Callable[[list[float]], PrefixRequests],
    runs: int,
    **own: Any,
) -> None:
    """Replicas of one expert under vLLM's present defaults, which keep `runs` ranges of cached blocks apart (`Runs`).

    `requests` makes the requests from the experts' mean scores.
    """
    SCENARIOS[name] = experts = REPLICAS

    def factory(**options: Any) -> tuple[RoutingEnvironment, EnvParams]:
        env, params = _of_experts(
            arrivals(), options, experts, "rtx4090", engine={"engine": "vllm-0.33"}, prefix_share="estimated", **own
        )
        engines = params.engines
        if engines.enable_prefix_caching:
            engines = engines.replace(prefix_pieces=PIECES, prefix_runs=runs)
        named = options.get("experts", experts)
        made = requests([EXPERTS[expert].mean_score for expert in named])
        workload = Workload.create(params.workload.arrivals, made)
        expiry = jnp.asarray(EXPIRY, float)
        return env, params.replace(workload=workload, engines=engines, prefix_expiry=expiry)

    register(name, factory, description)


def _middle(env: RoutingEnvironment, factors: dict[str, float]) -> Disturbances:
    starts = [0, max(env.episode_length // 3, 1), max(2 * env.episode_length // 3, 2)]
    tables = {name: np.ones((3, env.num_experts)) for name in factors}
    for name, factor in factors.items():
        tables[name][1, 0] = factor
    return Disturbances.create(starts, **tables)


def _needs(path: str | Path | None, name: str, what: str) -> Path:
    if path is None:
        raise UserError(
            f'environment {name} needs a file: make("{name}", path="...") or environment.path=... with {what}'
        )
    return Path(path)


def _azure(
    path: str | Path | None = None,
    rate_scale: float = 0.6,
    spread_ticks: bool = False,
    time_unit: str | None = None,
    run: int | None = None,
    **options: Any,
) -> tuple[RoutingEnvironment, EnvParams]:
    """A recorded trace. With `rate_scale` 0.6, the conversation trace has 3.2 instead of 5.4 requests/s.

    `spread_ticks`, `time_unit` and `run` are those of `jaxroute.workload.load_trace`.
    """
    file = _needs(path, "azure", "recorded requests (docs/formats.md)")
    trace = load_trace(file, spread_ticks=spread_ticks, time_unit=time_unit, run=run)
    try:
        arrivals = TraceArrivals.create(trace.times, rate_scale, start=None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return _of_experts(arrivals, options)


CLUSTER_KEYS = ("experts", "rate", "latency_limit", "token_scale")
EXPERT_KEYS = ("name", "mean_score", "latency", "kv_blocks", "profile")
ENGINE_KEYS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")


def _cluster(path: str | Path | None = None, **options: Any) -> tuple[RoutingEnvironment, EnvParams]:
    """Experts from a YAML file; docs/environment.md describes its format."""
    path = _needs(path, "cluster", "a YAML file of experts (docs/environment.md)")
    tree, listed = read_cluster(path, CLUSTER_KEYS)
    engines, scores = [], []
    for index, entry in enumerate(listed):
        where = f"experts[{index}]"
        expert = mapping(path, entry, where, (*EXPERT_KEYS, *ENGINE_KEYS))
        if "mean_score" not in expert:
            raise UserError(f"{path}: {where}: mean_score is missing")
        scores.append(positive(path, f"{where}: mean_score", expert["mean_score"]))
        engines.append(expert_engine(path, where, expert))
    rate, limit, scale = (
        positive(path, key, tree.get(key, default))
        for key, default in (("rate", 3.0), ("latency_limit", 0.03), ("token_scale", 256.0))
    )
    try:
        workload = Workload.create(PoissonArrivals.create(rate), FrozenRequests.create(scores))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    stacked = stack_engines(engines, f"{path}: experts")
    return environment_of(len(listed), options), params_of(workload, stacked, limit, scale)


def read_cluster(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """A cluster's file, with no other keys than `keys`, and its experts. Raises `UserError`."""
    tree = mapping(path, read_yaml(path), "the file", keys)
    listed = tree.get("experts")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: experts: must be a list of one or more experts")
    return tree, listed


def expert_engine(path: Path, where: str, expert: dict[str, Any]) -> EngineParams:
    """The engine of an expert in a cluster's file, from its profile, or from latency, kv_blocks and `ENGINE_KEYS`.

    `where` names the expert in errors. Raises `UserError`.
    """
    if "profile" in expert:
        own = {key: expert[key] for key in (*ENGINE_KEYS, "latency", "kv_blocks") if key in expert}
        if own:
            raise UserError(f"{path}: {where}: the profile contains {next(iter(own))}; leave one of them out")
        try:
            config = load_profile(str(expert["profile"]))["engine"]
        except UserError as error:
            raise UserError(f"{path}: {where}: {error}") from None
        return engine_from_config(config, f"{path}: {where}")
    for key in ("latency", "kv_blocks"):
        if key not in expert:
            raise UserError(f"{path}: {where}: {key} is missing")
    blocks = whole(path, f"{where}: kv_blocks", expert["kv_blocks"])
    config = {
        "latency": expert["latency"],
        "num_gpu_blocks": blocks + 1,  # vLLM keeps one block
        **{key: expert[key] for key in ENGINE_KEYS if key in expert},
    }
    return engine_from_config(config, f"{path}: {where}")


def mapping(path: Path, tree: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """`tree`, a mapping with no other keys than `keys`. Raises `UserError`."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {where}: must be a mapping with the keys {', '.join(keys)}")
    for key in tree:
        require_known(key, keys, "key", f"{path}: {where}: ")
    return tree


def whole(path: Path, key: str, value: Any) -> int:
    """`value`, a whole number of at least 1. Raises `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a whole number of at least 1, not {value!r}")
    return value


def positive(path: Path, key: str, value: Any) -> float:
    """`value`, a number above 0. Raises `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{path}: {key} must be a number above 0, not {value!r}")
    return float(value)


_scenario("paper-3", "the paper's three experts at 3 requests/s: a trade-off of quality and queues; start here")
_scenario("paper-6", "the paper's six experts at 3 requests/s: more choices, and half the load per expert", experts=SIX)
_scenario(
    "overload-3",
    "three experts at twice the load of paper-3: dropping some requests early lets more of them meet the limit",
    arrivals=lambda: PoissonArrivals.create(6.0),
)
_scenario(
    "bursts-3",
    "2 requests/s, with bursts of 8 requests/s that last some five seconds: each phase needs another policy",
    arrivals=lambda: MarkovArrivals.create((2.0, 8.0), (25.0, 5.0)),
)
_scenario(
    "slowdown-3",
    "the best expert is three times as slow in the middle third of an episode; its features show its speed",
    middle={"slowness": 3.0},
)
_scenario(
    "failure-3",
    "the best expert hangs in the middle third of an episode: requests there miss the limit until it recovers",
    middle={"slowness": FAILED},
)
_scenario(
    "quality-3",
    "the best expert's scores are 40 % lower in the middle third of an episode; only the rewards show it",
    middle={"quality": 0.6},
)
_scenario(
    "rtx4090-3",
    "RTX 4090s, measured with vLLM, at 90 requests/s, 22 ms per token: large batches, and each token takes time",
    arrivals=lambda: PoissonArrivals.create(90.0),
    profile="rtx4090",
    latency_limit=0.022,
    slots=96,
)
_scenario(
    "a100-3",
    "A100s at 100 requests/s, 13 ms per token: iterations are slow above 256 tokens, so prefills delay all",
    arrivals=lambda: PoissonArrivals.create(100.0),
    profile="a100",
    latency_limit=0.013,
    slots=96,
)
_scenario(
    "mixed-3",
    "the best model on the slowest GPU (RTX 3090, A40, A100) at 24 requests/s, 30 ms per token",
    arrivals=lambda: PoissonArrivals.create(24.0),
    profile=("rtx3090", "a40", "a100"),
    slots=96,
)
_scenario(
    "measured-3",
    "servers calibrated from logs at 40 requests/s, 30 ms per token: the best model is slow and serves only few",
    arrivals=lambda: PoissonArrivals.create(40.0),
    profile=("rtxpro6000x2-qwen3-32b", "rtx4090-llama-3.1-8b", "rtxpro6000-llama-3.1-8b"),
    slots=96,
)
_scenario(
    "memory-3",
    "prompts of 1,100 tokens, KV caches of 14,000: what a queue holds counts, not how many requests it has",
    arrivals=lambda: PoissonArrivals.create(5.5),
    profile="rtx4090",
    latency_limit=0.040,
    lengths=AZURE_CONVERSATION,
    engine={"kv_cache_tokens": 14_000},
)
_scenario(
    "memory-6",
    "as memory-3 with six experts, of which the best has a quarter of the KV cache of the largest",
    arrivals=lambda: PoissonArrivals.create(13.0),
    experts=SIX,
    profile="rtx4090",
    latency_limit=0.040,
    lengths=AZURE_CONVERSATION,
    engine={"kv_cache_tokens": (7_000, 14_000, 14_000, 14_000, 28_000, 28_000)},
)
_scenario(
    "long-prompts-3",
    "prompts of 3,200 tokens in bursts: four requests fill a KV cache of 14,000, and some are best dropped",
    arrivals=lambda: MarkovArrivals.create((0.75, 3.0), (25.0, 5.0)),
    profile="rtx4090",
    latency_limit=0.060,
    lengths=MOONCAKE_CONVERSATION,
    engine={"kv_cache_tokens": 14_000},
)
_with_prefixes(
    "chat-3",
    "conversations of eight tenants on three servers of one model: who has the conversation's prefix may be busy",
    lambda: PoissonArrivals.create(22.0),
    lambda scores: ConversationRequests.create(
        system_tokens=[400] * 8,
        tenant_weights=[1 / rank for rank in range(1, 9)],
        turns=5.0,
        message=Tokens.create(50, 0.7),
        answer=Tokens.create(80, 0.5),
        score_mean=scores,
        most_tokens=6000,
        pool=128,
    ),
    latency_limit=0.024,
    runs=128,
)
_with_prefixes(
    "documents-3",
    "questions about documents of 3,000 tokens: one server alone cannot answer all about the most popular one",
    lambda: PoissonArrivals.create(10.0),
    lambda scores: DocumentRequests.create(
        popularity=[rank**-1.5 for rank in range(1, 25)],
        questions=40.0,
        document=Tokens.create(3000, 0.4),
        message=Tokens.create(80, 0.5),
        answer=Tokens.create(150, 0.5),
        score_mean=scores,
    ),
    latency_limit=0.030,
    runs=128,
)
_with_prefixes(
    "agents-3",
    "agents with tools of 3,000 tokens in bursts, with short answers: histories grow until they are evicted",
    lambda: MarkovArrivals.create((8.0, 24.0), (20.0, 4.0)),
    lambda scores: ConversationRequests.create(
        system_tokens=[3000] * 4,
        tenant_weights=[1 / rank for rank in range(1, 5)],
        turns=10.0,
        message=Tokens.create(120, 0.8),
        answer=Tokens.create(40, 0.6),
        score_mean=scores,
        most_tokens=12_000,
        pool=64,
    ),
    latency_limit=0.040,
    runs=64,
)
register(
    "random-cluster",
    random_environment,
    "cluster number=7 of many drawn at random, with at most num_experts=6: for routers that meet any cluster",
)
SCENARIOS["azure"] = THREE
register("azure", _azure, 'the arrivals of a recorded trace, path="...csv", whose rate varies over hours')
register("cluster", _cluster, 'your own experts from a YAML file, path="experts.yaml"')
