"""One decision as one compiled program: facts of the ledger to state, observation and action."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import action_mask
from jaxroute.environment.state import EnvParams
from jaxroute.routers.choice import Router, predicted_latency
from jaxroute.serving.estimate import environment_state
from jaxroute.serving.ledger import Facts, Ledger
from jaxroute.workload.request import Request


class Asked(NamedTuple):
    """What is known of an arriving request, for N experts."""

    prompt_tokens: int  # at least 1
    predicted_tokens: np.ndarray  # int32 [N], output tokens, at least 1
    predicted_score: np.ndarray  # float32 [N]
    latency_limit: float  # s per output token


class Decision(NamedTuple):
    """Where a request goes."""

    expert: int | None  # None: dropped
    retry_after: int  # s, when a dropped request might be served in time


class _Given(NamedTuple):
    """What changes from decision to decision."""

    facts: Facts
    request: Request
    limit: np.float32  # s per output token
    allowed: np.ndarray  # bool [N]


class Decider:
    """Decides by a router. Every decision is the same program, whatever the queues, the limit and the engines are."""

    def __init__(self, env: RoutingEnvironment, router: Router, params: EnvParams, seed: int = 0):
        """`params` may be replaced at any time by others of the same shapes."""
        self.env, self.router, self.params = env, router, params.replace(workload=None)  # pyright: ignore
        self._key = jax.random.key(seed)

    def __call__(self, ledger: Ledger, now: float, asked: Asked, up: np.ndarray) -> Decision:
        """The decision at `now` among the experts that are `up`, bool [N], and have a free slot in the ledger."""
        request = Request(
            prompt_tokens=np.int32(asked.prompt_tokens),  # pyright: ignore
            output_tokens=asked.predicted_tokens,  # pyright: ignore
            score=asked.predicted_score,  # pyright: ignore
            predicted_output_tokens=asked.predicted_tokens,  # pyright: ignore
            predicted_score=asked.predicted_score,  # pyright: ignore
        )
        allowed = up & (ledger.count < ledger.slots)
        packed, form = _pack(_Given(ledger.facts(now), request, np.float32(asked.latency_limit), allowed))
        chosen, seconds = _decide(self.env, form, self.router, self.params, *packed, self._key).tolist()
        retry = math.ceil(seconds) if math.isfinite(seconds) else 1
        return Decision(int(chosen) if chosen < self.env.num_experts else None, max(retry, 1))


class _Form(NamedTuple):
    """The structure of a packed tree, hashable."""

    tree: Any
    leaves: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]  # type and shape


def _pack(tree: Any) -> tuple[tuple[np.ndarray, np.ndarray], _Form]:
    """The leaves as one array of int32 and one of float32: each argument of a program costs time of its own."""
    leaves, structure = jax.tree.flatten(tree)
    form = _Form(structure, tuple((leaf.dtype, leaf.shape) for leaf in leaves))
    of_kind = lambda floats: [leaf.ravel() for leaf in leaves if (leaf.dtype.kind == "f") == floats]  # noqa: E731
    ints = np.concatenate(of_kind(False), dtype=np.int32, casting="unsafe")
    return (ints, np.concatenate(of_kind(True), dtype=np.float32)), form


def _unpack(form: _Form, ints: jax.Array, floats: jax.Array) -> Any:
    """The tree of `_pack`."""
    leaves, at = [], {True: 0, False: 0}
    for dtype, shape in form.leaves:
        is_float, size = dtype.kind == "f", math.prod(shape)
        part = (floats if is_float else ints)[at[is_float] : at[is_float] + size]
        leaves.append(part.reshape(shape).astype(dtype))
        at[is_float] += size
    return jax.tree.unflatten(form.tree, leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decide(
    env: RoutingEnvironment,
    form: _Form,
    router: Any,
    params: EnvParams,
    ints: jax.Array,
    floats: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """float [2]: the action, 0..N, and the s that the request would be late at the best of the allowed experts."""
    facts, request, limit, allowed = _unpack(form, ints, floats)
    state = environment_state(facts, request, params.engines)
    # An expert that is not allowed has no room for any prompt, which is what the action mask of every router asks.
    longest = jnp.where(allowed, params.engines.max_model_len, 0)
    engines = params.engines.replace(max_model_len=longest)
    params = params.replace(latency_limit=limit, ttft_limit=None, tpot_limit=None, engines=engines)
    action = router(jax.random.fold_in(key, state.step), env.observe(state, params), state, params)
    mask = action_mask(state, params, env.slots)
    # A rule that finds no expert allowed chooses among all.
    action = jnp.where(mask[jnp.clip(action, 0, env.num_experts)], action, env.num_experts)
    late = (predicted_latency(state, params) - limit) * request.predicted_output_tokens
    return jnp.stack([action.astype(float), jnp.min(jnp.where(mask[:-1], late, jnp.inf))])
