"""`advance` as a kernel for NVIDIA GPUs (Pallas, Triton), and the function that selects it on these GPUs.

Without the kernel, `advance` is one loop over all engines. It runs until the slowest engine is done, and the state of
all engines crosses memory in every round. In the kernel, a program loads one engine, runs `advance` on it in registers
until that engine is done, and stores it. No engine waits for another, and the state crosses memory once. The kernel
calls the same functions, so it has no rules of its own and works for every discipline.

For one engine, `advance` may therefore use only what Triton can lower: elementwise operations; sums, minima and maxima
over slots; `cumsum`; loops. Triton lowers no slices, gathers, sorts, products of vectors, `any` or `all`, and no
constant scalar as the result of a round of a loop.
"""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.simulator.advance import EngineWork, advance
from jaxroute.simulator.engine import LARGE, EngineParams, EngineState

HAS_TRITON = find_spec("jax.experimental.pallas.triton") is not None
"""JAX has announced that a later version will not have it: GPUs then run the loop too."""

CHANGED = ("num_running", "clock", "generated", "computed", "preemptions", "first_token_time", "finish_time")
"""Fields of an engine's state that `advance` changes."""


def advance_engines(
    state: EngineState,
    work: EngineWork,
    until: jax.Array,
    params: EngineParams,
    most_iterations: jax.Array | int = LARGE,
    stall_iterations: jax.Array | int = LARGE,
) -> tuple[EngineState, EngineWork]:
    """`advance` without an observer; one kernel on an NVIDIA GPU, also under `jax.vmap`.

    The results can differ only in unused slots, which the kernel does not write. With prefix caching or
    asynchronous scheduling, GPUs run the loop too.
    """
    if not HAS_TRITON or params.enable_prefix_caching or params.async_scheduling:
        return advance(state, work, until, params, most_iterations, stall_iterations)[:2]
    inputs = (state, work, until, params, jnp.int32(most_iterations), jnp.int32(stall_iterations))
    loop = lambda *inputs: advance(*inputs)[:2]  # noqa: E731
    return jax.lax.platform_dependent(*inputs, cuda=advance_in_kernel, default=loop)


def advance_in_kernel(*inputs: Any, interpret: bool = False) -> tuple[EngineState, EngineWork]:
    """`advance` of engines [...] as a kernel with one program per engine; `interpret` runs it without a GPU.

    `inputs` are the six arguments of `advance`, all arrays. Those that engines share may have fewer or shorter axes and
    are in memory once. A program is one warp: each thread has a slot or two, so everything fits in registers, and a sum
    over slots is a few shuffles without a barrier.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    state, work, *_ = inputs
    engines = state.clock.shape
    block = pl.next_power_of_2(state.num_slots)

    def program(*refs: Any) -> None:
        ins, outs = refs[: len(inputs)], refs[len(inputs) :]
        state, _, until, *_ = ins
        # Engines whose next iteration starts later, and unused slots, are neither loaded nor stored.
        used = jnp.where(state.clock[...] < until[...], state.num_requests[...], 0)
        in_use = jnp.arange(block, dtype=jnp.int32) < used

        def load(ref: Any) -> jax.Array:
            return triton.load(ref, mask=in_use, other=0) if ref.shape else ref[...]

        def store(ref: Any, value: jax.Array) -> None:
            if ref.shape:
                triton.store(ref, value, mask=in_use)
            else:
                ref[...] = value

        state, work, _ = advance(*jax.tree.map(load, ins))
        jax.tree.map(store, outs, ([getattr(state, name) for name in CHANGED], work))

    def spec(leaf: Any) -> pl.BlockSpec:
        """One engine's part of a leaf: a scalar or `block` slots, the last of which may be out of bounds."""
        slots = leaf.ndim > len(engines)
        sizes = leaf.shape[slots:]

        def part(*engine: jax.Array) -> tuple[jax.Array | int, ...]:
            own = engine[len(engines) - len(sizes) :]
            return (*[0] * slots, *(index if size > 1 else 0 for index, size in zip(own, sizes, strict=True)))

        return pl.BlockSpec((*[block] * slots, *[None] * len(sizes)), part)

    outputs = jax.eval_shape(lambda: ([getattr(state, name) for name in CHANGED], work))
    leaves, structure = jax.tree.flatten(inputs)
    number = jax.tree.unflatten(structure, range(len(leaves)))
    changed, work = pl.pallas_call(
        program,
        out_shape=outputs,
        grid=engines,
        in_specs=jax.tree.map(spec, inputs),
        out_specs=jax.tree.map(spec, outputs),
        # The outputs alias the inputs, so what the kernel does not write keeps its value.
        input_output_aliases={getattr(number[0], name): place for place, name in enumerate(CHANGED)},
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="advance",
    )(*inputs)
    return state.replace(**dict(zip(CHANGED, changed, strict=True))), work
