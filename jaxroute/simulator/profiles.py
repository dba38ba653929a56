"""The experts that scenarios name, and the latency profiles of the hardware they run on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import engine_from_config

EXPERT_MEAN_SCORES = {
    "alpaca-native": 0.7146,
    "chatglm-6b": 0.7038,
    "mpt-7b-instruct": 0.6321,
    "koala-7B": 0.6396,
    "baize-7b": 0.6557,
    "mpt-7b": 0.6321,
}
"""The paper's experts, in its order, and their mean BERTScore on MixInstruct (simulation.md section 3; MPT's for
both).
"""

KV_BYTES_PER_TOKEN = {"chatglm-6b": 458_752}
"""KV cache of one token at fp16, bytes, where it is not that of the 7B LLaMA family and MPT: `LLAMA_7B_KV_BYTES`."""

LLAMA_7B_KV_BYTES = 524_288


@dataclass(frozen=True)
class Profile:
    """How fast a GPU runs an expert, and how many KV tokens it holds for a 7B LLaMA model."""

    latency: tuple[float, ...]  # s: c0, c1, c2, c3 and, with a knee, knee tokens and c4
    kv_cache_tokens: int
    max_num_seqs: int
    max_model_len: int
    latency_limit: float  # s a token, a limit that suits the profile
    token_scale: float  # tokens that count as 1 in observations
    same_kv_for_all: bool = False  # the KV cache is given in tokens, whatever the model
    source: str = ""


PROFILES = {
    "paper": Profile(
        latency=(0.015, 7.2e-5, 5e-5, 2.5e-5),
        kv_cache_tokens=14_000,
        max_num_seqs=64,
        max_model_len=8192,
        latency_limit=0.030,
        token_scale=256.0,
        same_kv_for_all=True,
        source="the frozen scenario: the paper's per-token constants (simulation.md section 7)",
    ),
    "rtx4090": Profile(
        latency=(0.018, 2.5e-5, 2.5e-5, 1.4e-7, 256, 6.5e-5),
        kv_cache_tokens=41_408,
        max_num_seqs=256,
        max_model_len=32_768,
        latency_limit=0.060,
        token_scale=2048.0,
        same_kv_for_all=True,
        source="Llama-3.1-8B on an RTX 4090, vLLM 0.19, measured: 25 us a token up to 256 in the step, 90 us above",
    ),
    "a100": Profile(
        latency=(0.0235, 1.405e-4, 6.07e-5, 5.93e-7),
        kv_cache_tokens=49_000,
        max_num_seqs=256,
        max_model_len=2048,
        latency_limit=0.060,
        token_scale=256.0,
        source="OPT-13B on an A100, measured: its decode and prefill regressions",
    ),
}
"""Latency profiles by name."""


def known(name: Any, names: Iterable[str], what: str) -> str:
    """`name`, if it is one of `names`; else a `UserError` with the nearest."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
        raise UserError(f"unknown {what} '{name}'; the nearest are {', '.join(near)}")
    return name


def cluster(experts: Sequence[str], profile_name: str, kv_cache_tokens: int | None = None) -> EngineParams:
    """Engines of a cluster, each field [N]: these experts, each on its own GPU of this profile.

    `kv_cache_tokens` overrides the KV cache of every engine. Raises `UserError` for an unknown expert or profile.
    """
    profile = PROFILES[known(profile_name, PROFILES, "profile")]
    engines = []
    for expert in experts:
        known(expert, EXPERT_MEAN_SCORES, "expert")
        tokens = kv_cache_tokens or profile.kv_cache_tokens
        if kv_cache_tokens is None and not profile.same_kv_for_all:
            tokens = tokens * LLAMA_7B_KV_BYTES // KV_BYTES_PER_TOKEN.get(expert, LLAMA_7B_KV_BYTES)
        config = {
            "latency": profile.latency,
            "num_gpu_blocks": tokens // 16 + 1,
            "max_num_seqs": profile.max_num_seqs,
            "max_model_len": profile.max_model_len,
        }
        engines.append(engine_from_config(config, f"expert {expert} on profile {profile_name}"))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *engines)
