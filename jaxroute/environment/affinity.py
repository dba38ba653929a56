"""What a router may know of prefix caches: the share of the arriving prompt that each expert holds.

Real routers estimate it from a record of what they sent where. Theirs has a bounded size, entries expire, and it knows
prompts only: neither answers nor what an engine has evicted. The exact share is what the engine would find now.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.simulator.engine import NEVER, EngineParams, EngineState, SharedBlocks
from jaxroute.simulator.prefix_runs import hashed_blocks, look_up, path_of
from jaxroute.workload.request import Prefix, Request


class SentRecord(struct.PyTreeNode):
    """The last M requests that were sent to experts, in a ring; the fields of a batch have the environments last."""

    owner: tuple[jax.Array, ...]  # K of int32 [M], as in `Prefix`
    end: tuple[jax.Array, ...]  # K of int32 [M], at most the prompt's tokens
    expert: jax.Array  # int32 [M]
    sent: jax.Array  # float [M], s relative to the current decision; -NEVER: no entry
    next: jax.Array  # int32 [], the place of the next entry


def empty_record(size: int, prefix: Prefix) -> SentRecord:
    """A record of M = `size` entries for requests with pieces like those of `prefix`."""
    none = jnp.zeros(size, jnp.int32)
    pieces = (none,) * prefix.owner.shape[0]
    return SentRecord(pieces, pieces, none, jnp.full(size, -NEVER, float), jnp.int32(0))


def _of_prompt(request: Request) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Owners and ends of the pieces of a request's prompt, K of int32 [...]."""
    prefix = request.prefix
    assert prefix is not None
    ends = [jnp.minimum(prefix.end[k], request.prompt_tokens) for k in range(prefix.end.shape[0])]
    return tuple(prefix.owner[k] for k in range(len(ends))), tuple(ends)


def note_sent(record: SentRecord, request: Request, expert: jax.Array, joined: jax.Array) -> SentRecord:
    """The record after a request was sent to `expert` (int32 [...]) where it `joined` (bool [...])."""
    size = record.expert.shape[0]
    here = joined & (jnp.arange(size).reshape(-1, *[1] * joined.ndim) == record.next)
    owner, end = _of_prompt(request)

    def put(old: jax.Array, new: jax.Array | float) -> jax.Array:
        return jnp.where(here, new, old)

    return SentRecord(
        owner=jax.tree.map(put, record.owner, owner),
        end=jax.tree.map(put, record.end, end),
        expert=put(record.expert, expert),
        sent=put(record.sent, 0.0),
        next=(record.next + joined) % size,
    )


def restarted(record: SentRecord, gap: jax.Array, begins: jax.Array) -> SentRecord:
    """The record `gap` s later (float [...]); without entries where an episode `begins` (bool [...])."""
    return record.replace(sent=jnp.where(begins, -NEVER, record.sent - gap), next=jnp.where(begins, 0, record.next))


def estimated_share(record: SentRecord, request: Request, expiry: jax.Array, num_experts: int) -> jax.Array:
    """float [N, ...]: the longest common prefix of the prompt and of a recorded prompt, over the prompt's tokens.

    Entries count for `expiry` s.
    """
    common = jnp.zeros_like(record.expert)
    for own, own_end, owner, end in zip(*_of_prompt(request), record.owner, record.end, strict=True):
        common = jnp.maximum(common, jnp.where(own == owner, jnp.minimum(own_end, end), 0))
    common = jnp.where(record.sent > -expiry, common, 0)
    longest = [jnp.max(jnp.where(record.expert == expert, common, 0), axis=0) for expert in range(num_experts)]
    return jnp.stack(longest) / request.prompt_tokens


def exact_share(engines: EngineState, request: Request, params: EngineParams) -> jax.Array:
    """float [N, ...]: the share of the prompt that a request at the head of `waiting` would find (rule B2)."""
    assert isinstance(engines.cache, SharedBlocks) and request.prefix is not None
    path = path_of(request.prefix, params)
    most = (request.prompt_tokens - 1) // params.block_size
    found, _ = look_up(engines.cache, path, hashed_blocks(engines, params), most)
    return found * params.block_size / request.prompt_tokens
