"""Reads an engine's options from a dictionary with vLLM's names and defaults."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.errors import UserError, require_known
from jaxroute.simulator.disciplines import DISCIPLINES
from jaxroute.simulator.engine import LARGE, EngineParams, LatencyModel
from jaxroute.workload.files import MOST_TOKENS

BLOCK_SIZE = 16
"""Tokens of a KV block, vLLM's default."""

DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "enable_chunked_prefill": True,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks": 10001,
    "max_model_len": 8192,
    "reserve_full_isl": True,
    "long_prefill_token_threshold": 0,
    "threshold_when_alone": True,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "unhashed_first": True,
    "latency": [0.00390625, 2**-14, 2**-16, 2**-24],
}
"""The latency is [c0, c1, c2, c3] or [c0, c1, c2, c3, knee, c4] of `LatencyModel`; the defaults are dyadic."""

_NOT_IN_V0 = (
    "enable_chunked_prefill",
    "reserve_full_isl",
    "long_prefill_token_threshold",
    "threshold_when_alone",
    "unhashed_first",
)
_ONLY_V1_DOES = ("enable_prefix_caching", "async_scheduling")
# Recorded schedules have the key unchecked_budget, and the tests' random cases reach small budgets by it.
_ONLY_IN_V0 = {"num_gpu_blocks": 10000, "watermark": 0.01, "async_output_proc": True, "unchecked_budget": False}

_SMALLEST = {"long_prefill_token_threshold": 0, "max_model_len": 2}


def defaults_of(discipline: str) -> dict[str, Any]:
    """The options of an engine under this discipline, with their defaults.

    vllm_v0 has the options of vLLM 0.6, where max_num_batched_tokens (here None) is at least max_model_len. orca has
    V1's options; the token budget, chunking, reserve_full_isl and the threshold have no effect on it.
    """
    if discipline != "vllm_v0":
        return DEFAULTS
    own = {key: value for key, value in DEFAULTS.items() if key not in _NOT_IN_V0}
    return {**own, **_ONLY_IN_V0, "max_num_batched_tokens": None}


def engine_from_config(
    config: Mapping[str, Any], where: str, also_known: tuple[str, ...] = (), discipline: str = "vllm_v1"
) -> EngineParams:
    """`EngineParams` of one engine, each field [], from options with vLLM's names; the defaults are `defaults_of`.

    `where` names the source in errors; `also_known` are further keys, which the caller reads.
    Raises `UserError` for an unknown key, a wrong type or a value out of range.
    """
    defaults, null_blocks = defaults_of(discipline), DISCIPLINES[discipline].null_blocks
    least = {**_SMALLEST, "num_gpu_blocks": null_blocks + 1}
    for key in config:
        require_known(key, [*defaults, *also_known], "engine option", f"{where}: ")
    values = {**DEFAULTS, **defaults, **{key: value for key, value in config.items() if key in defaults}}
    if values["max_num_batched_tokens"] is None:
        longest = values["max_model_len"]
        values["max_num_batched_tokens"] = max(longest, 2048) if isinstance(longest, int) else 2048
    for key, value in values.items():
        default = {**_ONLY_IN_V0, **DEFAULTS}[key]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
        elif isinstance(default, int):
            smallest = least.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < LARGE:
                raise UserError(f"{where}: {key} must be a whole number of at least {smallest}, not {value!r}")
    for key in _ONLY_V1_DOES:
        if discipline != "vllm_v1" and values[key]:
            raise UserError(f"{where}: {key} is simulated for the V1 engine only; leave it out, or false")
    watermark, is_async = None, None
    if discipline == "vllm_v0":
        _check_v0(values, where)
        watermark = jnp.int32(int(values["watermark"] * values["num_gpu_blocks"]))
        is_async = jnp.bool_(values["async_output_proc"])
    usable = values["num_gpu_blocks"] - null_blocks
    if usable * values["block_size"] > MOST_TOKENS:
        raise UserError(f"{where}: num_gpu_blocks * block_size must be at most {MOST_TOKENS} tokens")
    return EngineParams(
        latency=latency_model(values["latency"], where),
        usable_blocks=jnp.int32(usable),
        block_size=jnp.int32(values["block_size"]),
        max_num_seqs=jnp.int32(values["max_num_seqs"]),
        max_num_batched_tokens=jnp.int32(values["max_num_batched_tokens"]),
        max_model_len=jnp.int32(values["max_model_len"]),
        long_prefill_token_threshold=jnp.int32(values["long_prefill_token_threshold"]),
        enable_chunked_prefill=jnp.bool_(values["enable_chunked_prefill"]),
        reserve_full_isl=jnp.bool_(values["reserve_full_isl"]),
        watermark_blocks=watermark,
        async_output_proc=is_async,
        discipline=discipline,
        enable_prefix_caching=values["enable_prefix_caching"],
        async_scheduling=values["async_scheduling"],
        unhashed_first=values["unhashed_first"],
        threshold_when_alone=values["threshold_when_alone"],
    )


def stack_engines(engines: Sequence[EngineParams], where: str) -> EngineParams:
    """The engines of a cluster, each field [N]. Raises `UserError` if their static options differ."""
    for name in (*_ONLY_V1_DOES, "unhashed_first", "threshold_when_alone"):
        if len({getattr(engine, name) for engine in engines}) > 1:
            raise UserError(f"{where}: {name} must be the same for all experts; make it so in their profiles")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *engines)


def _check_v0(values: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` for options that vLLM 0.6 refuses at its start (simulation.md section 1a, rule 1)."""
    watermark, budget = values["watermark"], values["max_num_batched_tokens"]
    if isinstance(watermark, bool) or not isinstance(watermark, int | float) or not 0 <= watermark < 1:
        raise UserError(f"{where}: watermark must be a number from 0 to below 1, not {watermark!r}")
    for key in ("max_model_len", "max_num_seqs"):
        if budget < values[key] and not values["unchecked_budget"]:
            raise UserError(
                f"{where}: max_num_batched_tokens {budget} is below {key} {values[key]}, which vllm_v0 refuses"
            )


def latency_model(coefficients: Any, where: str) -> LatencyModel:
    """`LatencyModel` from [c0, c1, c2, c3] or [c0, c1, c2, c3, knee, c4]; raises `UserError`."""
    numbers = isinstance(coefficients, list | tuple) and all(
        isinstance(c, int | float) and not isinstance(c, bool) and math.isfinite(c) and c >= 0 for c in coefficients
    )
    if not numbers or len(coefficients) not in (4, 6) or coefficients[0] <= 0:
        raise UserError(
            f"{where}: latency must be [c0, c1, c2, c3] or [c0, c1, c2, c3, knee, c4], seconds, none negative and "
            f"c0 above 0, not {coefficients!r}"
        )
    padded = [*coefficients, 0.0, 0.0][:6]
    return LatencyModel(*(jnp.asarray(c, float) for c in padded))
