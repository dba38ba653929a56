"""Batches of environments: how `jax.vmap` over one environment becomes code on a whole batch.

Outside, environments are the first axis, as `jax.vmap` has it. Inside the step they are the last one, [slots, experts,
environments], so that every operation runs along whole rows of environments, with one decision for the batch where
a part can be left out. That is several times faster than a vmapped program on CPUs, and no slower elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint


def over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `function`, which works on batches, be called for one environment and under any number of `jax.vmap`s.

    `function(*others, params)` gets pytrees whose leaves have one leading axis, [B, ...], those of `params` [1, ...]
    where they are the same for all; and it returns leaves [B, ...]. The result takes and returns leaves without it.
    """

    @custom_vmap
    def batched(*args: Any) -> Any:
        return function(*args)

    @batched.def_vmap
    def merge_axes(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        # Two leading axes, [axis_size, B], become one.
        leaves, structure = jax.tree.flatten(args)
        flags = jax.tree.leaves(in_batched)
        first_of_params = len(leaves) - len(jax.tree.leaves(args[-1]))
        size = max(leaf.shape[flag] for leaf, flag in zip(leaves, flags, strict=True))

        def merge(index: int, leaf: jax.Array, flag: bool) -> jax.Array:
            if index >= first_of_params and not flag and leaf.shape[0] == 1:
                return leaf
            shape = leaf.shape[flag + 1 :]
            return jnp.broadcast_to(leaf, (axis_size, size, *shape)).reshape(axis_size * size, *shape)

        merged = [merge(index, *pair) for index, pair in enumerate(zip(leaves, flags, strict=True))]
        results = batched(*jax.tree.unflatten(structure, merged))
        results = jax.tree.map(lambda leaf: leaf.reshape(axis_size, size, *leaf.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    def one(*args: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], batched(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], args)))

    return one


def run_if(condition: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
    """`function(carry)` if `condition` (bool []) holds, else `carry` itself.

    As `lax.cond`, but a loop of at most one round: what it carries is changed in place, where a branch would copy it.
    """
    body = lambda looped: (jnp.bool_(False), function(looped[1]))  # noqa: E731
    return jax.lax.while_loop(lambda looped: looped[0], body, (condition, carry))[1]


def batch_last(tree: Any) -> Any:
    """Leaves [B, ...] to [..., B]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), tree)


def batch_first(tree: Any) -> Any:
    """Leaves [..., B] to [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), tree)


def keep_batch_last(leaf: jax.Array) -> jax.Array:
    """`leaf` [B, ...] itself, in memory as [..., B]: what works on it with environments last need not move it."""
    return with_layout_constraint(leaf, Layout(major_to_minor=(*range(1, leaf.ndim), 0)))
