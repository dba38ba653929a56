"""The two turns of a step with as few slots as hold all requests: an optimisation, which changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.batching import batch_first, batch_last, keep_batch_last
from jaxroute.environment.state import EnvState
from jaxroute.environment.turns import Outcome, Taken, Turn

FEW_SLOTS = 16
"""While no expert of a batch holds as many requests, only so many slots are worked on."""


def take_both(take: Callable[[EnvState, Turn], Taken], state: EnvState, decision: Turn, end: Turn) -> Outcome:
    """`take(state, decision)`, and from its state `take(state, end)`.

    The decision is taken on the first few slots, unless an expert holds more requests: then, and for the end of
    episodes, a loop of at most two rounds works on all slots. So the program contains `take` twice and not four times.
    """
    slots = state.engines.num_slots
    crowded = (jnp.max(state.engines.num_requests) >= FEW_SLOTS) & (slots > FEW_SLOTS)
    queues = (state.engines, state.queued)
    front = first_slots(queues)
    # Where they are crowded nobody takes part, so that the queues stay.
    taken = take(_with_queues(state, front), decision.only(~crowded))
    front = (taken.state.engines, taken.state.queued)
    outcome = Outcome(
        state=_with_queues(taken.state, (None, None)),
        observation=taken.observation,
        final_observation=taken.observation,
        qos=taken.qos,
        credit=taken.credit,
        penalty=taken.penalty,
    )

    # With environments first, as they came in, XLA needs no copy of the queues around the loop.
    put = lambda old, new: keep_batch_last(old.at[:, :FEW_SLOTS].set(new) if new.ndim == 3 else new)  # noqa: E731
    queues = jax.tree.map(put, batch_first(queues), batch_first(front))

    def on_all_slots(carry: tuple[jax.Array, jax.Array, Any, Outcome]) -> tuple[jax.Array, jax.Array, Any, Outcome]:
        decides, ends, queues, outcome = carry
        turn = _choose(decides, decision, end)
        taken = take(_with_queues(outcome.state, batch_last(queues)), turn)
        queues = jax.tree.map(keep_batch_last, batch_first((taken.state.engines, taken.state.queued)))
        shown = lambda new, old: jnp.where(turn.takes_part.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
        outcome = Outcome(
            state=_with_queues(taken.state, (None, None)),
            observation=jax.tree.map(shown, taken.observation, outcome.observation),
            final_observation=_choose(decides, taken.observation, outcome.final_observation),
            qos=outcome.qos + jnp.where(decides, taken.qos, 0),
            credit=outcome.credit + jnp.where(decides, taken.credit, 0),
            penalty=outcome.penalty + jnp.where(decides, taken.penalty, 0),
        )
        return jnp.bool_(False), ends & decides, queues, outcome

    carry = (crowded, jnp.any(end.takes_part), queues, outcome)
    *_, queues, outcome = jax.lax.while_loop(lambda carry: carry[0] | carry[1], on_all_slots, carry)
    return outcome.replace(state=_with_queues(outcome.state, batch_last(queues)))


def first_slots(tree: Any) -> Any:
    """Leaves [S, N, B] cut to the first few slots; those without slots as they are."""
    return jax.tree.map(lambda leaf: leaf[:FEW_SLOTS] if leaf.ndim == 3 else leaf, tree)


def _with_queues(state: EnvState, queues: Any) -> EnvState:
    return state.replace(engines=queues[0], queued=queues[1])


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` where `condition` (bool []) holds, else of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
