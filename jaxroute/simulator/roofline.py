"""A guess of an engine from the data sheets of its GPU and model, for hardware without measurements.

An iteration reads every weight once and the KV cache of its requests, and each of its tokens needs two operations per
weight. Its duration is the longer of the two: a base up to the number of tokens at which the operations take as long as
reading the weights, and a slope above it. The guess includes no overhead and assumes peak rates, so real servers are
slower (docs/calibration.md).
"""

from dataclasses import dataclass
from typing import Any

from jaxroute.errors import UserError, require_known
from jaxroute.simulator.engine_config import BLOCK_SIZE
from jaxroute.simulator.gpus import GPUS, MEMORY_USED, Gpu
from jaxroute.workload.files import MOST_TOKENS


@dataclass(frozen=True)
class ModelData:
    """Shape of a decoder-only transformer. A mixture of experts has `experts` MLPs; a token uses some of them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    experts: int = 1
    experts_used: int = 1
    max_model_len: int = 32_768
    bytes_per_weight: int = 2

    def _weights(self, experts: int) -> int:
        """Weights of the layers and the output. The embedding is left out, since a token reads only one row of it."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate * experts
        return self.layers * (attention + mlp) + self.hidden * self.vocabulary

    @property
    def read_bytes(self) -> int:
        """Bytes that an iteration reads if it uses every expert."""
        return self.bytes_per_weight * self._weights(self.experts)

    @property
    def stored_bytes(self) -> int:
        """What the weights take of a GPU's memory, the embedding included."""
        return self.read_bytes + self.bytes_per_weight * self.hidden * self.vocabulary

    @property
    def operations(self) -> int:
        """Operations per token."""
        return 2 * self._weights(self.experts_used)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bytes_per_weight


MODELS = {
    "llama-2-7b": ModelData(32, 4096, 32, 32, 128, 11_008, 32_000, max_model_len=4096),
    "mistral-7b": ModelData(32, 4096, 32, 8, 128, 14_336, 32_000),
    "llama-3.1-8b": ModelData(32, 4096, 32, 8, 128, 14_336, 128_256, max_model_len=131_072),
    "llama-3.1-70b": ModelData(80, 8192, 64, 8, 128, 28_672, 128_256, max_model_len=131_072),
    "qwen2.5-7b": ModelData(28, 3584, 28, 4, 128, 18_944, 152_064),
    "qwen3-32b": ModelData(64, 5120, 64, 8, 128, 25_600, 151_936, max_model_len=40_960),
    "qwen3-30b-a3b": ModelData(48, 2048, 32, 4, 128, 768, 151_936, 128, 8, max_model_len=262_144),
}
"""From the models' config.json."""


def known_in(text: str | None, table: dict[str, Any]) -> str | None:
    """The longest name of `table` that `text` contains, such as "NVIDIA GeForce RTX 4090"; None if there is none."""

    def plain(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum())

    found = [name for name in table if plain(name) in plain(text or "")]
    return max(found, key=len, default=None)


def roofline(gpu: Gpu, model: ModelData, gpus: int = 1) -> dict[str, Any]:
    """Engine options (`engine_config.engine_from_config`) of the model on `gpus` GPUs, which share it evenly.

    Raises `UserError` if the weights leave no room for a KV cache.
    """
    bandwidth, speed = 1e9 * gpus * gpu.bandwidth_gb_s, 1e12 * gpus * gpu.tflops
    room = MEMORY_USED * 1e9 * gpus * gpu.memory_gb - model.stored_bytes
    blocks = int(room / model.kv_bytes) // BLOCK_SIZE
    if blocks < 2:
        raise UserError(
            f"roofline: {model.stored_bytes / 1e9:.1f} GB of weights leave no KV cache in {gpus} x "
            f"{gpu.memory_gb:g} GB; choose a larger GPU, or more GPUs"
        )
    base, token = model.read_bytes / bandwidth, model.operations / speed
    return {
        "latency": [base, 0.0, 0.0, model.kv_bytes / bandwidth, base / token, token],
        "num_gpu_blocks": min(blocks, MOST_TOKENS // BLOCK_SIZE),
        "max_model_len": min(model.max_model_len, (blocks - 1) * BLOCK_SIZE),
    }


def roofline_by_name(gpu: str, model: str, gpus: int = 1) -> dict[str, Any]:
    """`roofline` of a GPU of `GPUS` and a model of `MODELS`; raises `UserError` for an unknown name."""
    return roofline(GPUS[require_known(gpu, GPUS, "GPU")], MODELS[require_known(model, MODELS, "model")], gpus)
