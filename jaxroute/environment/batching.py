"""Batches of environments: turns `jax.vmap` over one environment into code for a whole batch.

Outside of the step, environments are the first axis, as in `jax.vmap`. Inside they are the last axis, [slots, experts,
environments], so that every operation runs along whole rows of environments, and one condition for the whole batch
decides whether a part of the step can be skipped. On CPUs this is several times faster than a vmapped program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


def in_own_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced with JAX's default promotion of ranks and dtypes, whatever modes its caller has set."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return run


def _with_automatic_sharding(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of leaves [B, ...], inside of which XLA chooses shardings even if B is sharded explicitly."""

    def run(*args: Any) -> Any:
        for leaf in jax.tree.leaves(args):
            sharding = jax.typeof(leaf).sharding
            if sharding.spec and sharding.spec[0] is not None and AxisType.Explicit in sharding.mesh.axis_types:
                out = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
                return auto_axes(function, out_sharding=out)(*args)
        return function(*args)

    return run


def over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function`, which works on batches, callable for one environment and under any number of `jax.vmap`s.

    `function(*others, params)` receives pytrees whose leaves have one leading axis, [B, ...]; leaves of `params` are
    [1, ...] if they are the same for all environments. It returns leaves [B, ...]. The function that `over_batch`
    returns takes and returns leaves without that axis.
    """

    function = in_own_modes(_with_automatic_sharding(function))

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
    if leaf.shape[0] == 1:  # both are the same; and `jax.export` refuses constraints
        return leaf
    return with_layout_constraint(leaf, Layout(major_to_minor=(*range(1, leaf.ndim), 0)))
