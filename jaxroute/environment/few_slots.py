"""Runs the two turns of a step on few slots if they hold all requests: an optimisation that changes no result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute.environment.batching import batch_first, batch_last, keep_batch_last
from jaxroute.environment.state import EnvState
from jaxroute.environment.turns import Outcome, Taken, Turn

FEW_SLOTS = 16
"""While every expert of a batch holds fewer requests than this, a step computes only this many slots."""


def take_both(take: Callable[[EnvState, Turn], Taken], state: EnvState, decision: Turn, end: Turn) -> Outcome:
    """Computes `take(state, decision)` and then `take` of its state and `end`.

    The decision uses the first few slots, unless an expert holds more requests. In that case, and at the end of
    episodes, a loop of at most two rounds uses all slots. The program therefore contains `take` twice instead of four
    times.
    """
    slots = state.engines.num_slots
    crowded = (jnp.max(state.engines.num_requests) >= FEW_SLOTS) & (slots > FEW_SLOTS)
    queues = (state.engines, state.queued)
    front = first_slots(queues)
    # In a crowded batch no environment takes part, so that the queues do not change here.
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

    # With environments first, as in the input, XLA does not copy the queues before and after the loop.
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
    """Leaves [S, N, B] reduced to the first few slots; leaves without slots do not change."""
    return jax.tree.map(lambda leaf: leaf[:FEW_SLOTS] if leaf.ndim == 3 else leaf, tree)


def _with_queues(state: EnvState, queues: Any) -> EnvState:
    return state.replace(engines=queues[0], queued=queues[1])


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """The leaves of `new` if `condition` (bool []) is True, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
