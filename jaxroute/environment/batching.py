"""Batches of environments: turns `jax.vmap` over one environment into code for a whole batch.

Outside of the step, environments are the first axis, as in `jax.vmap`. Inside they are the last axis, [slots, experts,
environments], so that every operation runs along whole rows of environments, and one condition for the whole batch
decides whether a part of the step can be skipped. On CPUs this is several times faster than a vmapped program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint


def over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function`, which works on batches, callable for one environment and under any number of `jax.vmap`s.

    `function(*others, params)` receives pytrees whose leaves have one leading axis, [B, ...]; leaves of `params` are
    [1, ...] if they are the same for all environments. It returns leaves [B, ...]. The function that `over_batch`
    returns takes and returns leaves without that axis.
    """

    @custom_vmap
    def batched(*args: Any) -> Any:
        return function(*args)

    @batched.def_vmap
    def merge_axes(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        # The two leading axes, [axis_size, B], become one.
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
    """`function(carry)` if `condition` (bool []) is True, else `carry`.

    This is `lax.cond` as a loop of at most one round. A loop changes its carry in place; a branch would copy it.
    """
    body = lambda looped: (jnp.bool_(False), function(looped[1]))  # noqa: E731
    return jax.lax.while_loop(lambda looped: looped[0], body, (condition, carry))[1]


def batch_last(tree: Any) -> Any:
    """Moves the first axis of all leaves to the end: [B, ...] to [..., B]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), tree)


def batch_first(tree: Any) -> Any:
    """Moves the last axis of all leaves to the front: [..., B] to [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), tree)


def keep_batch_last(leaf: jax.Array) -> jax.Array:
    """`leaf` [B, ...], stored in memory as [..., B], so that code with environments last need not copy it."""
    return with_layout_constraint(leaf, Layout(major_to_minor=(*range(1, leaf.ndim), 0)))
