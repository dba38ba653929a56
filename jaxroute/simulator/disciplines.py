"""The scheduling disciplines by name: each discipline is a file of rules and an entry of the table here.

`EngineParams.discipline` is static, so a program contains the rules of one discipline only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute.simulator import scheduler, scheduler_orca, scheduler_v0
from jaxroute.simulator.engine import NEVER, EngineParams, EngineState, SharedBlocks, blocks_for, total
from jaxroute.simulator.prefix_runs import free_blocks
from jaxroute.simulator.scheduler import SchedulerOutput


class Discipline(NamedTuple):
    """What distinguishes a discipline: functions of engines with any trailing axes, and constants."""

    schedule: Callable[[EngineState, EngineParams], SchedulerOutput]
    only_decodes: Callable[..., jax.Array]  # bool [...]: only decodes follow while memory suffices (`scheduler`)
    can_serve: Callable[[jax.Array, jax.Array, EngineParams], jax.Array]  # of prompt, output tokens: it can finish
    occupies: Callable[[EngineState, EngineParams], jax.Array]  # bool [S, ...]: the engine works on the request
    finished: Callable[[EngineState, EngineParams], jax.Array]  # bool [S, ...]: the engine has finished the request
    after_iteration: Callable[
        ..., EngineState
    ]  # of (before, after, output, iteration number, params): the corrected `after`
    held_blocks: Callable[[jax.Array, EngineParams], jax.Array]  # KV blocks of a request with this many cached tokens
    admissible_blocks: Callable[[EngineParams], jax.Array]  # KV blocks that admissions may fill
    longest: Callable[[EngineParams], jax.Array]  # number of tokens, prompt and output, at which a request ends
    spare_blocks: int = 0  # KV blocks that an iteration of decodes leaves free
    grows: bool = True  # whether a decode may take a KV block
    ignores: bool = False  # whether requests that can never fit are dropped, so that the engine never stalls
    finished_stay: bool = False  # whether a finished request may keep its seat for further iterations
    null_blocks: int = 1  # number of `num_gpu_blocks` that no request can hold


def _blocks_of_tokens(tokens: jax.Array, params: EngineParams) -> jax.Array:
    return blocks_for(tokens, params.block_size)


def _all_blocks(params: EngineParams) -> jax.Array:
    return params.usable_blocks


def _unfinished(state: EngineState, params: EngineParams) -> jax.Array:
    del params
    return state.unfinished()


def _has_last_token(state: EngineState, params: EngineParams) -> jax.Array:
    del params
    return (state.position < state.num_requests) & (state.finish_time < NEVER)


def _nothing_more(
    before: EngineState, after: EngineState, output: SchedulerOutput, iteration: jax.Array, params: EngineParams
) -> EngineState:
    del before, output, iteration, params
    return after


DISCIPLINES = {
    "vllm_v1": Discipline(
        schedule=scheduler.schedule,
        only_decodes=scheduler.only_decodes,
        can_serve=scheduler.can_serve,
        occupies=_unfinished,
        finished=_has_last_token,
        after_iteration=_nothing_more,
        held_blocks=_blocks_of_tokens,
        admissible_blocks=_all_blocks,
        longest=lambda params: params.max_model_len,
    ),
    "vllm_v0": Discipline(
        schedule=scheduler_v0.schedule,
        only_decodes=scheduler_v0.only_decodes,
        can_serve=scheduler_v0.can_serve,
        occupies=scheduler_v0.occupies,
        finished=scheduler_v0.finished,
        after_iteration=scheduler_v0.after_iteration,
        held_blocks=_blocks_of_tokens,
        admissible_blocks=scheduler_v0.admissible_blocks,
        longest=lambda params: params.max_model_len + 1,
        spare_blocks=1,
        ignores=True,
        finished_stay=True,
        null_blocks=0,
    ),
    "orca": Discipline(
        schedule=scheduler_orca.schedule,
        only_decodes=scheduler_orca.only_decodes,
        can_serve=scheduler_orca.can_serve,
        occupies=_unfinished,
        finished=_has_last_token,
        after_iteration=_nothing_more,
        held_blocks=scheduler_orca.held_blocks,
        admissible_blocks=_all_blocks,
        longest=lambda params: params.max_model_len,
        grows=False,
    ),
}


def used_blocks(state: EngineState, params: EngineParams) -> jax.Array:
    """int32 [...]: KV blocks that the running requests hold."""
    if isinstance(state.cache, SharedBlocks):
        return params.usable_blocks - free_blocks(state.cache)
    blocks = rules(params).held_blocks(state.computed, params)
    return total(jnp.where(state.position < state.num_running, blocks, 0))


def rules(params: EngineParams) -> Discipline:
    """The discipline of these engines."""
    return DISCIPLINES[params.discipline]
