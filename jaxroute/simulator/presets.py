"""What `vllm serve` uses by default in some versions, as options of an engine.

The switches are vLLM's own, and so are the seats and the token budget, which depend on the GPU's memory. An A100 counts
as a small GPU, whatever memory it has.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxroute.errors import UserError, require_known
from jaxroute.simulator.gpus import GPUS


class Preset(NamedTuple):
    """The discipline of a version, its switches, and whether GPUs from 160 GiB have a larger token budget."""

    discipline: str
    switches: Mapping[str, Any]
    largest_tier: bool = False


_ON = {"enable_prefix_caching": True, "async_scheduling": True}
PRESETS = {
    "vllm-0.33": Preset("vllm_v1", {**_ON, "threshold_when_alone": False, "unhashed_first": True}, largest_tier=True),
    "vllm-0.19": Preset("vllm_v1", {**_ON, "threshold_when_alone": True, "unhashed_first": False}),
    "vllm-0.6": Preset("vllm_v0", {}),
}
"""By version."""


def with_version(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a V1 engine, in which `engine`, if it is there, names a version whose defaults the others override.

    `gpu` decides about its seats and token budget (`seats_and_budget`). Raises `UserError`.
    """
    own = {key: value for key, value in config.items() if key not in ("engine", "gpu")}
    if "engine" not in config:
        if "gpu" in config:
            raise UserError(f"{where}: gpu is for an engine of {', '.join(PRESETS)}; name one, or leave gpu out")
        return own
    preset = PRESETS[require_known(str(config["engine"]), PRESETS, "engine", f"{where}: ")]
    if preset.discipline != "vllm_v1":
        raise UserError(
            f"{where}: engine {config['engine']} is no V1 engine, whose options these are; name a later one"
        )
    gpu = config.get("gpu")
    if gpu is not None:
        require_known(str(gpu), GPUS, "GPU", f"{where}: ")
    return {**defaults_on(preset, gpu), **own}


def in_place_of(profile: Mapping[str, Any], version: str) -> dict[str, Any]:
    """What of a profile's options (V1's) an engine of this version keeps: its hardware, seats and longest request."""
    preset = PRESETS[version]
    if preset.discipline == "vllm_v1":
        return {key: value for key, value in profile.items() if key not in preset.switches}
    kept = {key: profile[key] for key in ("latency", "block_size", "max_num_seqs", "max_model_len")}
    return {**kept, "num_gpu_blocks": profile["num_gpu_blocks"] - 1}  # V0 keeps none for itself


def defaults_on(preset: Preset, gpu: str | None) -> dict[str, Any]:
    """The options of a version on this GPU (`seats_and_budget`), which given ones override. Raises `UserError`."""
    return {**preset.switches, **seats_and_budget(preset, gpu)}


def seats_and_budget(preset: Preset, gpu: str | None) -> dict[str, int]:
    """`max_num_seqs` and `max_num_batched_tokens` on this GPU of `GPUS`; None is a small one. V0 has its own defaults.

    Raises `UserError` for an unknown GPU.
    """
    memory = 0.0 if gpu in (None, "a100") else GPUS[require_known(gpu, GPUS, "GPU")].memory_gb
    if preset.discipline != "vllm_v1":
        return {}
    if memory < 70:
        return {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
    return {"max_num_seqs": 1024, "max_num_batched_tokens": 16_384 if memory >= 160 and preset.largest_tier else 8192}
