"""Slots of a queue: a request joins at the end, and finished requests are removed without reordering the others."""

import jax
import jax.numpy as jnp

from jaxroute.simulator.engine import NEVER, EngineState, Flight, OwnBlocks, Path, Tree, prefix_sum, total


def append(
    state: EngineState,
    joins: jax.Array,
    prompt_tokens: jax.Array,
    target_tokens: jax.Array,
    at: jax.Array,
    known_end: jax.Array | bool = True,
    path: Path | None = None,
) -> EngineState:
    """Puts a request at the tail of `waiting` at time `at` (s) where `joins` (bool [...]); all arguments are [...].

    The caller has checked that a slot is free. An idle engine starts at the arrival; a busy engine keeps its clock.
    `known_end`: the request ends by its length, and not by a stop token (rules C3 and C4). `path` is needed by a cache
    of shared blocks only: K of int32 [...].
    """
    here = joins & (state.position == state.num_requests)
    cache = state.cache
    if isinstance(cache, OwnBlocks):
        cache = cache.replace(found=jnp.where(here, 0, cache.found))
    elif cache is not None:
        own = jax.tree.map(lambda new, old: jnp.where(here, new, old), path, cache.path)
        cache = cache.replace(path=own, hit=jnp.where(here, 0, cache.hit))
    clock, flight = state.clock, state.flight
    if flight is not None:
        # A last batch, of which nothing was left, ends before an idle engine notices the arrival.
        ended = joins & (at > clock)
        clock = jnp.where(ended, clock + flight.duration, clock)
        flight = Flight(
            duration=jnp.where(ended, 0, flight.duration),
            sampled=flight.sampled & ~here,
            unhashed=flight.unhashed & ~here,
            known_end=jnp.where(here, known_end, flight.known_end),
        )
    return state.replace(
        cache=cache,
        flight=flight,
        num_requests=state.num_requests + joins,
        clock=jnp.where(joins, jnp.maximum(clock, at), clock),
        prompt_tokens=jnp.where(here, prompt_tokens, state.prompt_tokens),
        target_tokens=jnp.where(here, target_tokens, state.target_tokens),
        generated=jnp.where(here, 0, state.generated),
        computed=jnp.where(here, 0, state.computed),
        preemptions=jnp.where(here, 0, state.preemptions),
        first_token_time=jnp.where(here, NEVER, state.first_token_time),
        finish_time=jnp.where(here, NEVER, state.finish_time),
    )


_AT_ONCE = 3
"""Requests per engine that a round of `remove` removes; more than one rarely finish between two arrivals."""


def remove(state: EngineState, carried: Tree, done: jax.Array) -> tuple[EngineState, Tree]:
    """Removes the requests in the slots `done` (bool [S, ...]); `carried`, further arrays [S, ...], move with them.

    A slot is filled from the next remaining one, which is at most a few slots further on. Selecting among shifted
    copies is an order of magnitude cheaper on CPUs than a gather by sorted or counted positions.
    """

    def shifted(leaf: jax.Array, by: int) -> jax.Array:
        return jnp.concatenate([leaf[by:], leaf[:by]])

    def close_gaps(carry: tuple[EngineState, Tree, jax.Array]) -> tuple[EngineState, Tree, jax.Array]:
        state, carried, done = carry
        gaps = prefix_sum(done)
        leaves_now = done & (gaps <= _AT_ONCE)
        gaps = jnp.minimum(gaps, _AT_ONCE)
        # `shifted` wraps slots i < by around to the end, which is harmless: such a slot has at most i + 1 <= by gaps up
        # to it, and exactly `by` gaps only if it is a gap itself, so it is never selected as a slot that moves up.
        comes = [(shifted(gaps, by) == by) & ~shifted(leaves_now, by) for by in range(_AT_ONCE)]

        def fill(leaf: jax.Array) -> jax.Array:
            if leaf.ndim != done.ndim:  # of engines, or of `Runs`
                return leaf
            filled = shifted(leaf, _AT_ONCE)
            for by in reversed(range(_AT_ONCE)):
                filled = jnp.where(comes[by], shifted(leaf, by), filled)
            return filled

        num_running = state.num_running - total(leaves_now & (state.position < state.num_running))
        filled, carried = jax.tree.map(fill, (state, carried))
        filled = filled.replace(num_requests=state.num_requests - total(leaves_now), num_running=num_running)
        # Slots past the end may receive a copy of a gap.
        return filled, carried, fill(done & ~leaves_now) & (state.position < filled.num_requests)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), close_gaps, (state, carried, done))[:2]
