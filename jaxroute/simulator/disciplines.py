"""The scheduling disciplines by name, and what each of them decides: a rule is in the file its function comes from.

`EngineParams.discipline` is static, so a program contains the rules of one discipline only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute.simulator import scheduler, scheduler_orca, scheduler_v0
from jaxroute.simulator.engine import EngineParams, EngineState, blocks_for, total
from jaxroute.simulator.scheduler import Decision


class Discipline(NamedTuple):
    """Functions of an engine's parameters, with any trailing axes."""

    schedule: Callable[[EngineParams, EngineState], Decision]
    only_decodes: Callable[..., jax.Array]  # the iterations that follow are a run of decodes, while memory lasts
    can_serve: Callable[[EngineParams, jax.Array, jax.Array], jax.Array]  # by prompt and output tokens: it can finish
    present: Callable[[EngineParams, EngineState], jax.Array]  # bool [S, ...]: takes part in the engine's work
    held_blocks: Callable[[EngineParams, jax.Array], jax.Array]  # KV blocks of a request with so many tokens in them
    admissible_blocks: Callable[[EngineParams], jax.Array]  # KV blocks that admissions may fill
    longest: Callable[[EngineParams], jax.Array]  # tokens, prompt and output, at which a request ends
    spare_blocks: int = 0  # KV blocks that stay free in an iteration of decodes
    grows: bool = True  # a decode may take a KV block
    ignores: bool = False  # requests that can never fit are dropped, and so the engine never stalls
    null_blocks: int = 1  # of `num_gpu_blocks`, those that no request can hold


def _blocks_of_tokens(params: EngineParams, tokens: jax.Array) -> jax.Array:
    return blocks_for(tokens, params.block_size)


def _all_blocks(params: EngineParams) -> jax.Array:
    return params.usable_blocks


def _unfinished(params: EngineParams, state: EngineState) -> jax.Array:
    del params
    return state.unfinished()


DISCIPLINES = {
    "vllm_v1": Discipline(
        schedule=scheduler.schedule,
        only_decodes=scheduler.only_decodes,
        can_serve=scheduler.can_serve,
        present=_unfinished,
        held_blocks=_blocks_of_tokens,
        admissible_blocks=_all_blocks,
        longest=lambda params: params.max_model_len,
    ),
    "vllm_v0": Discipline(
        schedule=scheduler_v0.schedule,
        only_decodes=scheduler_v0.only_decodes,
        can_serve=scheduler_v0.can_serve,
        present=scheduler_v0.present,
        held_blocks=_blocks_of_tokens,
        admissible_blocks=scheduler_v0.admissible_blocks,
        longest=lambda params: params.max_model_len + 1,
        spare_blocks=1,
        ignores=True,
        null_blocks=0,
    ),
    "orca": Discipline(
        schedule=scheduler_orca.schedule,
        only_decodes=scheduler_orca.only_decodes,
        can_serve=scheduler_orca.can_serve,
        present=_unfinished,
        held_blocks=scheduler_orca.held_blocks,
        admissible_blocks=_all_blocks,
        longest=lambda params: params.max_model_len,
        grows=False,
    ),
}


def used_blocks(params: EngineParams, state: EngineState) -> jax.Array:
    """int32 [...]: KV blocks that the running requests hold."""
    blocks = rules(params).held_blocks(params, state.computed)
    return total(jnp.where(state.position < state.num_running, blocks, 0))


def rules(params: EngineParams) -> Discipline:
    """The discipline of these engines."""
    return DISCIPLINES[params.discipline]
