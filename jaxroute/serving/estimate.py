"""From the facts of a ledger to the state of the environment, by the simulator's own rules.

The tokens that came say which requests run, and how far they are, at the end of the last iteration that was seen. From
there the simulated engines run to the present: the iteration under way, with whom it admits and preempts, is the one
that the simulator would run. So nothing is scheduled, counted or predicted by other code than in an episode.
"""

import jax
import jax.numpy as jnp

from jaxroute.environment.state import EnvState, QueuedRequests
from jaxroute.serving.ledger import Facts
from jaxroute.simulator.cluster import collect, run_until
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import LARGE, EngineParams, EngineState, empty_engine, lowest, prefix_sum, total
from jaxroute.workload.arrivals import WorkloadState
from jaxroute.workload.request import Request


def environment_state(facts: Facts, request: Request, params: EngineParams) -> EnvState:
    """The environment at the decision on `request`, with totals None. True scores and lengths are the predicted ones.

    A running request ends in the estimate only at `Facts.most_tokens`, since its true length is not known.
    """
    facts = jax.tree.map(lambda leaf: leaf.T, facts)  # slots first
    engines = _last_seen(facts, params)
    # Those that were sent during the iteration under way are not in it.
    present = total((engines.position < facts.count) & (facts.sent <= facts.round_start))
    decoding = engines.num_running > 0
    now = jnp.zeros(present.shape, float)
    engines, _, _ = run_until(engines.replace(num_requests=present), now, params, most_iterations=1)
    # If that iteration should have ended, the next one is under way, or several of a long prefill without any token.
    prompts = total(jnp.where((engines.position < facts.count) & (facts.generated == 0), facts.prompt_tokens, 0))
    most = jnp.where(decoding, 1, prompts // params.max_num_batched_tokens + 1)
    engines, _, _ = run_until(engines.replace(num_requests=facts.count), now, params, most_iterations=most)
    queued = QueuedRequests(
        arrival=facts.sent.astype(float),
        index=facts.index,
        score=facts.predicted_score.astype(float),
        predicted_score=facts.predicted_score.astype(float),
        predicted_tokens=facts.predicted_tokens,
    )
    engines, queued, _ = collect(engines, queued, params)
    return EnvState(
        engines=engines,
        queued=queued,
        request=request,
        workload=WorkloadState(cursor=jnp.int32(0), phase=jnp.zeros((), float)),
        step=facts.step,
        recent_gap=facts.recent_gap.astype(float),
        recent_latency=facts.recent_latency.astype(float),
        totals=None,
    )


def _last_seen(facts: Facts, params: EngineParams) -> EngineState:
    """The engines at the end of the last iteration whose tokens came; `facts` have slots first."""
    engines = empty_engine(facts.sent.shape[0], facts.sent.shape[1:], params)
    position = engines.position
    there = position < facts.count
    length = facts.prompt_tokens + facts.generated
    has_tokens = there & (facts.generated > 0)
    computed = jnp.where(has_tokens, length - 1, 0)
    # Running requests stand before waiting ones, so all up to the last one whose tokens come are running. Behind it are
    # those that have no token yet, and those whose stream has stalled: they were preempted.
    streams = has_tokens & (facts.behind + facts.complete < 2)
    running = jnp.max(jnp.where(streams, position + 1, 0), axis=0)
    blocks = prefix_sum(jnp.where(there, rules(params).held_blocks(computed, params), 0))
    holds = (blocks <= params.usable_blocks) & (position < params.max_num_seqs)
    running = jnp.minimum(running, lowest(jnp.where(holds, LARGE, position)))
    return engines.replace(
        num_requests=facts.count,
        num_running=running,
        clock=facts.round_start.astype(float),
        prompt_tokens=jnp.where(there, facts.prompt_tokens, 0),
        target_tokens=jnp.where(there, jnp.maximum(facts.most_tokens, facts.generated + 1), 0),
        generated=jnp.where(there, facts.generated, 0),
        computed=jnp.where(position < running, computed, 0),
    )
