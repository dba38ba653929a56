"""The routers to compare with, by name: `make_router("power_of_two", env)`.

Each is a pure function for one environment, `router(observation, state, params, key) -> action int32 []`, for
`jax.jit` and `jax.vmap`. Only the planning ones drop requests; the others choose among the experts that the action mask
allows, or among all where it allows none, and the environment counts the rejection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.errors import known
from jaxroute.routers import paper, planning, serving
from jaxroute.routers.choice import Router

ROUTERS: dict[str, Callable[..., Router]] = {
    "round_robin": paper.round_robin,
    "shortest_queue": paper.shortest_queue,
    "bert_router": paper.bert_router,
    "random": serving.random,
    "least_work": serving.least_work,
    "power_of_two": serving.power_of_two,
    "latency_based": serving.latency_based,
    "vllm_data_parallel": serving.vllm_data_parallel,
    "llm_d": serving.llm_d,
    "routellm": serving.routellm,
    "score_minus_load": serving.score_minus_load,
    "lookahead": planning.lookahead,
    "clairvoyant": planning.clairvoyant,
}
"""Name -> factory `(env, **numbers) -> Router`, whose docstring has the rule and its source."""


def make_router(name: str, env: RoutingEnvironment, **numbers: Any) -> Router:
    """The router of this name for `env`; `numbers` in place of its factory's defaults may be traced.

    Raises:
        UserError: there is no such router.
    """
    return ROUTERS[known(name, ROUTERS, "router")](env, **numbers)
