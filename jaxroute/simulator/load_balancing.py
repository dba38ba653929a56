"""How vLLM spreads requests over data-parallel engines: the router and the calibration compute it alike."""

from __future__ import annotations

import jax


def data_parallel_load(waiting: jax.Array, running: jax.Array) -> jax.Array:
    """int32 [...]: vLLM sends a request to the engine with the smallest 4 * waiting + running, the first of equals.

    `DPLBAsyncMPClient.get_core_engine_for_request`
    (https://github.com/vllm-project/vllm/blob/v0.10.2/vllm/v1/engine/core_client.py), with counts that are always
    fresh; later versions weigh waiting requests by KV use.
    """
    return 4 * waiting + running
