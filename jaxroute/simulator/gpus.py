"""The data of each GPU, from which profiles and roofline guesses are computed."""

from typing import NamedTuple

MEMORY_USED = 0.9
"""Share of a GPU's memory that the engine uses: vLLM's default gpu_memory_utilization."""


class Gpu(NamedTuple):
    """NVIDIA's data sheet, and if measured the time of a 7B model's linear layers."""

    memory_gb: float
    bandwidth_gb_s: float  # of the memory
    tflops: float  # dense bf16 operations with float32 accumulation
    linear_ms: tuple[float, float, float] | None = None  # with 1, 256 and 2,048 tokens per iteration


GPUS = {
    "rtx3090": Gpu(24, 936, 71, (21.7, 67.5, 519.0)),
    "rtx4090": Gpu(24, 1008, 165),
    "rtx5090": Gpu(32, 1792, 210),
    "rtxpro6000": Gpu(96, 1792, 504),
    "a6000": Gpu(48, 768, 155, (23.4, 51.9, 348.0)),
    "a40": Gpu(48, 696, 150, (23.9, 44.6, 259.0)),
    "a100": Gpu(80, 2039, 312, (9.3, 17.8, 133.5)),
    "l4": Gpu(24, 300, 121),
    "l40s": Gpu(48, 864, 362),
    "h100": Gpu(80, 3350, 989, (5.6, 9.2, 40.4)),
    "h200": Gpu(141, 4800, 989),
    "b200": Gpu(180, 8000, 2250),
}
"""GPUs by name; the SXM version if there are two."""
