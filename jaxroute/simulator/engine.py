"""One serving engine: its options, and the state of its queue.

vLLM keeps `running` in order of admission and puts preempted requests, last admitted first, back at the head of
`waiting`. One ordered array with a boundary can therefore hold both queues: the first `num_running` positions run, and
the others wait. Preemption and admission only move the boundary.

Slots are the first axis. Several engines are trailing axes, written `...` in shapes: a field of a slot is [S, ...] and
a field of an engine is [...]. The two then broadcast, and a sum over slots adds whole rows of engines, which vector
units do fast. The functions of this folder accept any such trailing axes.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Tree = TypeVar("Tree")

NEVER = jnp.inf
"""Time of an event that has not happened."""

IGNORED = -jnp.inf
"""Finish time of a request that ended without being served: `vllm_v0` dropped it because it can never fit, or its
client gave up."""

LARGE = 2**30
"""An integer above every count of tokens, iterations or positions."""


class LatencyModel(struct.PyTreeNode):
    """Seconds an iteration takes: `c0 + c1*np + c2*nd + c3*ctx + c4*max(np + nd - knee, 0)` (simulation.md section 2).

    np = prefill and recompute tokens, nd = decode entries, ctx = computed tokens of the scheduled entries afterwards.
    The last term is the steeper slope of a real GPU above some number of tokens per iteration; c4 = 0 disables it.
    All fields are traced floats [...]: [] for one engine, [N] for a cluster.
    """

    base: jax.Array  # c0, s
    per_prefill_token: jax.Array  # c1, s
    per_decode: jax.Array  # c2, s
    per_context_token: jax.Array  # c3, s
    knee_tokens: jax.Array  # knee, tokens
    per_token_above_knee: jax.Array  # c4, s


class EngineParams(struct.PyTreeNode):
    """Options of an engine under vLLM's names.

    Every field is traced, [...]: [] for one engine, [N] for a cluster. The fields at the end are static, and the same
    for the whole cluster. Those after the discipline are for vllm_v1 (simulation.md section 1c).
    """

    latency: LatencyModel
    usable_blocks: jax.Array  # int32, KV blocks that requests can hold: `num_gpu_blocks` less the null block
    block_size: jax.Array  # int32, tokens per KV block
    max_num_seqs: jax.Array  # int32, maximum number of running requests
    max_num_batched_tokens: jax.Array  # int32, token budget of an iteration
    max_model_len: jax.Array  # int32, a request ends when its prompt + generated tokens reach it
    long_prefill_token_threshold: jax.Array  # int32, maximum tokens of a request per iteration; 0: no limit
    enable_chunked_prefill: jax.Array  # bool
    reserve_full_isl: jax.Array  # bool, admit only requests whose whole prompt fits
    watermark_blocks: jax.Array | None = None  # int32, vllm_v0: KV blocks that an admission must leave free
    async_output_proc: jax.Array | None = None  # bool, vllm_v0: stop conditions are checked one iteration later
    discipline: str = struct.field(pytree_node=False, default="vllm_v1")  # a name of `disciplines.DISCIPLINES`
    enable_prefix_caching: bool = struct.field(pytree_node=False, default=False)
    async_scheduling: bool = struct.field(pytree_node=False, default=False)
    unhashed_first: bool = struct.field(pytree_node=False, default=True)  # rule B8: False before vLLM 0.23
    threshold_when_alone: bool = struct.field(pytree_node=False, default=True)  # rule A1: False since vLLM 0.31
    prefix_pieces: int = struct.field(pytree_node=False, default=0)  # K of `Path`; 0: prompts share nothing
    prefix_runs: int = struct.field(pytree_node=False, default=64)  # R of `Runs`


class OwnBlocks(struct.PyTreeNode):
    """The prefix cache of requests that share nothing, each of which can only find blocks of its own."""

    found: jax.Array  # int32 [S, ...], cached blocks of a preempted request; 0 for others
    ahead: jax.Array  # int32 [S, ...], free blocks that are allocated before these; means nothing where `found` is 0


class Path(struct.PyTreeNode):
    """What the full blocks of a request are: K pieces, each of which ends `end` blocks after the request's beginning.

    Two requests have their leading blocks in common up to the smaller end of a piece in which both have one owner, an
    arbitrary number; so an owner has its place among the pieces, and all before it are the same. An end of 0: no piece.
    """

    owner: tuple[jax.Array, ...] | jax.Array  # K of int32 [S, ...] or, in `Runs`, [R, ...]
    end: tuple[jax.Array, ...] | jax.Array  # the same, blocks


class Runs(struct.PyTreeNode):
    """Free blocks with content: R ranges of blocks of requests that left.

    The last block of a range is allocated first. The additional first axis tells these arrays from those of slots.
    """

    path: Path  # of the requests, [K, R, ...]
    bounds: jax.Array  # int32 [2, R, ...], the first block, and the one behind the last; equal: there is no range
    order: jax.Array  # int32 [1, R, ...], 0 to R - 1, each once: the range with the lowest number is allocated first


class SharedBlocks(struct.PyTreeNode):
    """The prefix cache of requests that share prefixes (prefix_runs.py)."""

    path: Path  # of each request
    hit: jax.Array  # int32 [S, ...], blocks that a running request found at its admission
    blank: jax.Array  # int32 [...], free blocks without content, which are allocated before all others
    runs: Runs


class Flight(struct.PyTreeNode):
    """What asynchronous scheduling adds: the batch that is being executed while the next one is scheduled."""

    duration: jax.Array  # float [...], s, which begin at `EngineState.clock`; 0 if there is no batch
    sampled: jax.Array  # bool [S, ...], the batch yields a token of the request
    unhashed: jax.Array  # bool [S, ...], its last computed token was in flight when it was scheduled (rule C6)
    known_end: jax.Array  # bool [S, ...], the request ends by its length, which is known, and not by a stop token


class EngineState(struct.PyTreeNode):
    """Queue of an engine with S slots, in order. Times are seconds relative to the present, so they stay small.

    A slot in [0, num_requests) is in use. A request that finishes during an advance keeps its slot, marked by its
    finish time, until the slots are compacted (`slots.remove`); schedulers skip it.
    """

    num_requests: jax.Array  # int32 [...], slots in use
    num_running: jax.Array  # int32 [...], boundary: slots before it run, the others wait
    clock: jax.Array  # float [...], start of the next iteration; in the past when the engine is idle
    prompt_tokens: jax.Array  # int32 [S, ...]
    target_tokens: jax.Array  # int32 [S, ...], tokens to generate: the true length, limited by max_model_len
    generated: jax.Array  # int32 [S, ...], tokens generated so far; a preemption keeps them
    computed: jax.Array  # int32 [S, ...], tokens in the KV cache; 0 while waiting
    preemptions: jax.Array  # int32 [S, ...]
    first_token_time: jax.Array  # float [S, ...], NEVER before it
    finish_time: jax.Array  # float [S, ...], NEVER before it, IGNORED for one that was not served
    cache: OwnBlocks | SharedBlocks | None = None  # with `enable_prefix_caching`
    flight: Flight | None = None  # with `async_scheduling`; clock is then the time at which the next batch is scheduled

    @property
    def num_slots(self) -> int:
        """S, the shape of the slot arrays (static)."""
        return self.prompt_tokens.shape[0]

    @property
    def next_start(self) -> jax.Array:
        """float [...]: when the batch that is scheduled next starts, s."""
        return self.clock if self.flight is None else self.clock + self.flight.duration

    @property
    def position(self) -> jax.Array:
        """int32 [S, 1...]: the number of each slot."""
        return slot_positions(self.prompt_tokens)

    def unfinished(self) -> jax.Array:
        """bool [S, ...]: the slot holds a request that has not finished."""
        return (self.position < self.num_requests) & (self.finish_time == NEVER)


def slot_positions(slots: jax.Array) -> jax.Array:
    """int32 [S, 1...]: the number of each slot of `slots` [S, ...]."""
    return jnp.arange(slots.shape[0], dtype=jnp.int32).reshape(-1, *[1] * (slots.ndim - 1))


def empty_engine(num_slots: int, shape: tuple[int, ...] = (), params: EngineParams | None = None) -> EngineState:
    """Idle engines with `num_slots` free slots each; `shape` is their trailing axes, () for one engine.

    The static options of `params` say what the state consists of; without it, they have their defaults.
    """
    in_flight = params is not None and params.async_scheduling
    no = jnp.zeros((num_slots, *shape), bool)
    integers = jnp.zeros((num_slots, *shape), jnp.int32)
    never = jnp.full((num_slots, *shape), NEVER, float)
    return EngineState(
        num_requests=jnp.zeros(shape, jnp.int32),
        num_running=jnp.zeros(shape, jnp.int32),
        clock=jnp.zeros(shape, float),
        prompt_tokens=integers,
        target_tokens=integers,
        generated=integers,
        computed=integers,
        preemptions=integers,
        first_token_time=never,
        finish_time=never,
        cache=_empty_cache(integers, params),
        flight=Flight(jnp.zeros(shape, float), no, no, no) if in_flight else None,
    )


def _empty_cache(slots: jax.Array, params: EngineParams | None) -> OwnBlocks | SharedBlocks | None:
    """The cache of idle engines; `slots` are zeros, int32 [S, ...]."""
    if params is None or not params.enable_prefix_caching:
        return None
    pieces, shape = params.prefix_pieces, slots.shape[1:]
    if not pieces:
        return OwnBlocks(slots, slots)
    none = jnp.zeros((pieces, params.prefix_runs, *shape), jnp.int32)
    return SharedBlocks(
        path=Path((slots,) * pieces, (slots,) * pieces),
        hit=slots,
        blank=jnp.broadcast_to(params.usable_blocks, shape),
        runs=Runs(
            Path(none, none),
            jnp.zeros((2, params.prefix_runs, *shape), jnp.int32),
            jnp.broadcast_to(slot_positions(none[0]), (1, params.prefix_runs, *shape)),
        ),
    )


def blocks_for(tokens: jax.Array, block_size: jax.Array) -> jax.Array:
    """KV blocks that hold `tokens`: ceil(tokens / block_size), int32.

    It multiplies floats, since CPUs have no SIMD integer division. Subtracting one half keeps the quotient away from
    integers, so rounding is exact below 2**20 tokens, even on a GPU that divides approximately.
    """
    reciprocal = 1.0 / block_size.astype(jnp.float32)
    return jnp.floor((tokens + (block_size - 1)).astype(jnp.float32) * reciprocal + 0.5 * reciprocal).astype(jnp.int32)


def full_blocks(tokens: jax.Array, block_size: jax.Array) -> jax.Array:
    """KV blocks that `tokens` fill: floor(tokens / block_size), int32."""
    return blocks_for(tokens + 1, block_size) - 1


def total(values: jax.Array) -> jax.Array:
    """Sum over slots, [...] of `values` [S, ...], with their dtype; bool counts as int32. Values must be finite.

    It is a product with ones: XLA recomputes a sum inside every operation that uses it, without vector instructions,
    but computes a product once.
    """
    if values.ndim == 1:  # one engine in a GPU program (advance_kernel.py), which has no such product
        return jnp.sum(values, dtype=jnp.int32 if values.dtype == bool else values.dtype)
    return _product(jnp.ones((1, values.shape[0])), values)[0]


def prefix_sum(values: jax.Array) -> jax.Array:
    """Inclusive cumulative sum over slots, with the shape and dtype of `values` [S, ...]; a product like `total`."""
    if values.ndim == 1:
        return jax.lax.cumsum(values.astype(jnp.int32) if values.dtype == bool else values)
    return _product(jnp.tri(values.shape[0]), values)


def _product(matrix: jax.Array, values: jax.Array) -> jax.Array:
    """Matrix product [M, ...] of `matrix` [M, S] and `values` [S, ...]."""
    values = values.astype(jnp.int32) if values.dtype == bool else values
    flat = values.reshape(values.shape[0], -1)
    product = jnp.dot(matrix.astype(values.dtype), flat, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(-1, *values.shape[1:])


def anywhere(mask: jax.Array) -> jax.Array:
    """bool []: whether `mask` (bool [...]) is True for any engine."""
    return jnp.any(mask) if mask.ndim else mask


def lowest(values: jax.Array) -> jax.Array:
    """Minimum over slots: [...] of `values` [S, ...]."""
    return jnp.min(values, axis=0)


def target_tokens(prompt_tokens: jax.Array, output_tokens: jax.Array, max_model_len: jax.Array) -> jax.Array:
    """Tokens that a request generates: its output length, or fewer if max_model_len ends it (vLLM's check_stop).

    `max_model_len` is the result of `disciplines.Discipline.longest`.
    """
    return jnp.maximum(jnp.minimum(output_tokens, max_model_len - prompt_tokens), 1)
