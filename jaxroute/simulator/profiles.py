"""The experts that scenarios name, and the hardware that they run on.

A profile gives an engine's latency model and KV cache. `paper`, `rtx4090` and calibrated profiles, which are files
(`catalogue`), state both. The others are GPUs with measured times of a 7B model's linear layers. For an expert, these
times are scaled by the size of its weights; the time of a context token is its KV bytes per token over the memory
bandwidth; and the KV cache is the memory that its weights leave free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from jaxroute.errors import UserError, require_known
from jaxroute.simulator import catalogue
from jaxroute.simulator.disciplines import DISCIPLINES
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import BLOCK_SIZE, engine_from_config, stack_engines
from jaxroute.simulator.gpus import GPUS, MEMORY_USED
from jaxroute.simulator.presets import PRESETS, seats_and_budget


@dataclass(frozen=True)
class Expert:
    """A model: its mean BERTScore on MixInstruct, and its size at fp16."""

    mean_score: float
    weights_gb: float
    kv_bytes: int  # of one token


EXPERTS = {
    "alpaca-native": Expert(0.7146, 13.5, 524_288),
    "chatglm-6b": Expert(0.7038, 12.3, 458_752),
    "mpt-7b-instruct": Expert(0.6321, 13.5, 524_288),
    "koala-7B": Expert(0.6396, 13.5, 524_288),
    "baize-7b": Expert(0.6557, 13.5, 524_288),
    "mpt-7b": Expert(0.6321, 13.5, 524_288),
    "oasst-12b": Expert(0.7468, 23.6, 737_280),
    "vicuna-13b": Expert(0.6960, 26.0, 819_200),
    "dolly-12b": Expert(0.6226, 23.6, 737_280),
    "stablelm-7b": Expert(0.6247, 15.7, 393_216),
}
"""The six experts of the paper in its order, then others of MixInstruct. Both MPT models have MPT's score."""


@dataclass(frozen=True)
class Profile:
    """An engine whose latency and KV cache are given and do not depend on the expert."""

    latency: tuple[float, ...]  # s: c0, c1, c2, c3; with a knee also its tokens and c4
    usable_blocks: int  # KV blocks of `BLOCK_SIZE` tokens
    max_num_seqs: int
    max_model_len: int
    latency_limit: float  # s per token, a suitable limit for the profile
    token_scale: float  # tokens that count as 1 in observations
    engine: Mapping[str, Any] = field(default_factory=dict)  # further options with vLLM's names
    gpu: str | None = None  # a name of `GPUS`, where a version's defaults decide about seats and token budget


REFERENCE_WEIGHTS_GB = 13.5
"""Weights of the 7B model that `Gpu.linear_ms` was measured with."""


def profile_of_gpu(name: str, expert_name: str) -> Profile:
    """The profile of a GPU of `GPUS` with measured linear layers, for an expert.

    Raises `UserError` if the expert's weights leave no room for a KV cache.
    """
    gpu, expert = GPUS[name], EXPERTS[expert_name]
    assert gpu.linear_ms is not None
    one, knee, many = (1e-3 * ms * expert.weights_gb / REFERENCE_WEIGHTS_GB for ms in gpu.linear_ms)
    slope, steep = (knee - one) / 255, (many - knee) / (2048 - 256)
    room = MEMORY_USED * gpu.memory_gb - expert.weights_gb
    if room <= 0:
        raise UserError(
            f"expert {expert_name} does not fit profile {name}: {expert.weights_gb} GB of weights, "
            f"{MEMORY_USED * gpu.memory_gb:.1f} GB of memory; choose a larger GPU"
        )
    return Profile(
        latency=(one, slope, slope, expert.kv_bytes / (1e9 * gpu.bandwidth_gb_s), 256, max(steep - slope, 0.0)),
        usable_blocks=int(1e9 * room / expert.kv_bytes) // BLOCK_SIZE - 1,
        max_num_seqs=256,
        max_model_len=2048,
        latency_limit=0.060,
        token_scale=256.0,
        gpu=name,
    )


PROFILES = {
    # The frozen scenario (simulation.md section 7): the per-token constants of the paper's first author.
    "paper": Profile((0.015, 7.2e-5, 5e-5, 2.5e-5), 14_000 // BLOCK_SIZE, 64, 8192, 0.030, 256.0),
    # Measured: Llama-3.1-8B, vLLM 0.19, 2,588 KV blocks, one of them vLLM's; 25 us/token up to 256, then 90 us/token.
    "rtx4090": Profile((0.018, 2.5e-5, 2.5e-5, 1.4e-7, 256, 6.5e-5), 2587, 256, 32_768, 0.060, 2048.0),
}
"""Profiles that are the same for every expert."""

TIMED_GPUS = [name for name, gpu in GPUS.items() if gpu.linear_ms]
"""GPUs whose profile depends on the size of the expert."""


def calibrated(name: str) -> Profile:
    """The profile of a name that `catalogue.load_profile` accepts. Its latency limit is 1.5 times the base.

    Raises `UserError`.
    """
    engine = dict(catalogue.load_profile(name)["engine"])
    size, blocks = engine.pop("block_size"), engine.pop("num_gpu_blocks") - 1
    if size != BLOCK_SIZE:
        raise UserError(f"profile {name}: block_size is {size}; experts have KV blocks of {BLOCK_SIZE} tokens")
    latency = tuple(engine.pop("latency"))
    limit, scale = ceil(1500 * latency[0]) / 1000, 2048.0
    return Profile(latency, blocks, engine.pop("max_num_seqs"), engine.pop("max_model_len"), limit, scale, engine)


def engine_profiles(experts: Sequence[str], profile: str | Sequence[str]) -> list[Profile]:
    """The profile of each expert; `profile` is one name for all experts or a name for each.

    A name is one of `PROFILES` or `TIMED_GPUS`, or one that `catalogue.load_profile` accepts. Raises `UserError`.
    """
    names = [profile] * len(experts) if isinstance(profile, str) else list(profile)
    if len(names) != len(experts):
        raise UserError(f"profile: {len(names)} names for {len(experts)} experts; give one, or one for each")
    found = []
    for expert, name in zip(experts, names, strict=True):
        require_known(expert, EXPERTS, "expert")
        if name in PROFILES:
            found.append(PROFILES[name])
        elif name in TIMED_GPUS:
            found.append(profile_of_gpu(name, expert))
        else:
            if not catalogue.is_path_or_guess(name):
                require_known(name, [*PROFILES, *TIMED_GPUS, *catalogue.shipped()], "profile")
            found.append(calibrated(name))
    return found


def cluster(
    experts: Sequence[str],
    profiles: Sequence[Profile],
    kv_cache_tokens: int | Sequence[int] | None = None,
    discipline: str = "vllm_v1",
    max_model_len: int | None = None,
    engine: str | None = None,
) -> EngineParams:
    """Engines of a cluster, each field [N]: expert i on its own GPU of profile i.

    `kv_cache_tokens`, one number or one per expert, overrides the KV caches of the profiles; under every `discipline`
    requests can hold the same number of blocks. vllm_v0 has its default, asynchronous output processing.
    `max_model_len` overrides that of the profiles; orca reserves this many tokens per request. `engine`, a name of
    `presets.PRESETS`, selects the discipline and the defaults of a version. Raises `UserError`.
    """
    preset = None
    if engine is not None:
        preset = PRESETS[require_known(engine, PRESETS, "engine")]
        if discipline != "vllm_v1":
            raise UserError(f"engine {engine} has its own discipline, {preset.discipline}; leave discipline out")
        discipline = preset.discipline
    null_blocks = DISCIPLINES[require_known(discipline, DISCIPLINES, "discipline")].null_blocks
    blocks = [profile.usable_blocks for profile in profiles]
    if kv_cache_tokens is not None:
        given = [kv_cache_tokens] * len(experts) if isinstance(kv_cache_tokens, int) else list(kv_cache_tokens)
        if len(given) != len(experts):
            raise UserError(f"kv_cache_tokens: {len(given)} numbers for {len(experts)} experts; give one, or one each")
        if min(given) < BLOCK_SIZE:
            raise UserError(
                f"kv_cache_tokens must be at least {BLOCK_SIZE}, the tokens of one KV block, not {min(given)}"
            )
        blocks = [tokens // BLOCK_SIZE for tokens in given]
    engines = []
    for expert, profile, usable in zip(experts, profiles, blocks, strict=True):
        config = {
            **({} if discipline == "vllm_v0" else profile.engine),
            "latency": profile.latency,
            "num_gpu_blocks": usable + null_blocks,
            "max_num_seqs": profile.max_num_seqs,
            "max_model_len": max_model_len or profile.max_model_len,
        }
        if preset is not None:
            config |= {**preset.switches, **(seats_and_budget(preset, profile.gpu) if profile.gpu else {})}
        engines.append(engine_from_config(config, f"expert {expert}", discipline=discipline))
    return stack_engines(engines, "experts")
