"""What `vllm serve` uses by default in some versions, as options of an engine.

The switches are vLLM's own, and so are the seats and the token budget, which depend on the GPU's memory. An A100 counts
as a small GPU, whatever memory it has.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxroute.errors import require_known
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
