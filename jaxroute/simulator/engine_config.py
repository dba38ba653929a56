"""An engine's options from a dictionary under vLLM's names, with vLLM's defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxroute.errors import UserError
from jaxroute.simulator.engine import EngineParams, LatencyModel

DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "enable_chunked_prefill": True,
    "block_size": 16,
    "num_gpu_blocks": 10001,
    "max_model_len": 8192,
    "reserve_full_isl": True,
    "long_prefill_token_threshold": 0,
    "latency": [0.00390625, 2**-14, 2**-16, 2**-24],
}
"""The latency is [c0, c1, c2, c3] or [c0, c1, c2, c3, knee, c4] of `LatencyModel`; these values are dyadic."""

_SMALLEST = {"long_prefill_token_threshold": 0, "num_gpu_blocks": 2, "max_model_len": 2}
_MOST_TOKENS = 2**21


def engine_from_config(config: Mapping[str, Any], where: str, also_known: tuple[str, ...] = ()) -> EngineParams:
    """`EngineParams` of one engine, each field [], from options under vLLM's names; missing ones take `DEFAULTS`.

    `where` names the source in errors; `also_known` are keys that the caller reads itself.
    Raises `UserError` for an unknown key, a wrong type or a value out of range.
    """
    for key in config:
        if key not in DEFAULTS and key not in also_known:
            near = difflib.get_close_matches(str(key), [*DEFAULTS, *also_known], n=3, cutoff=0.0)
            raise UserError(f"{where}: unknown engine option '{key}'; the nearest are {', '.join(near)}")
    values = {**DEFAULTS, **{key: value for key, value in config.items() if key in DEFAULTS}}
    for key, default in DEFAULTS.items():
        value = values[key]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
        elif isinstance(default, int):
            smallest = _SMALLEST.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**30:
                raise UserError(f"{where}: {key} must be a whole number of at least {smallest}, not {value!r}")
    if (values["num_gpu_blocks"] - 1) * values["block_size"] >= _MOST_TOKENS:
        raise UserError(f"{where}: num_gpu_blocks * block_size must stay below {_MOST_TOKENS} tokens")
    return EngineParams(
        latency=latency_model(values["latency"], where),
        usable_blocks=jnp.int32(values["num_gpu_blocks"] - 1),
        block_size=jnp.int32(values["block_size"]),
        max_num_seqs=jnp.int32(values["max_num_seqs"]),
        max_num_batched_tokens=jnp.int32(values["max_num_batched_tokens"]),
        max_model_len=jnp.int32(values["max_model_len"]),
        long_prefill_token_threshold=jnp.int32(values["long_prefill_token_threshold"]),
        enable_chunked_prefill=jnp.bool_(values["enable_chunked_prefill"]),
        reserve_full_isl=jnp.bool_(values["reserve_full_isl"]),
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
