"""vLLM 0.10's rule for data-parallel engines, which a router and the calibration use."""

import jax


def data_parallel_load(waiting: jax.Array, running: jax.Array) -> jax.Array:
    """int32 [...]: vLLM 0.10 sends a request to the engine with the smallest 4 * waiting + running, the first of
    equal ones.

    This is `DPLBAsyncMPClient.get_core_engine_for_request` of
    https://github.com/vllm-project/vllm/blob/v0.10.2/vllm/v1/engine/core_client.py with counts that are always current.
    Later versions have the rule of the router `vllm_data_parallel`.
    """
    return 4 * waiting + running
