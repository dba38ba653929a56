"""Action impact estimator: the QoS that sending a request to an expert costs the requests already there.

It has three forms (simulation.md section 4). Each is a pure function of an engine's queue of S slots before the request
joins, with any trailing axes (`...`, as in `simulator.engine`):

- `predicted_impact`, the default, uses predictions and the expert's own latency model. It includes waiting requests,
  and counts only requests that the action turns from met to missed;
- `paper_impact` is the paper's formula, on the true lengths and scores of running requests only;
- `exact_impact` runs the engine with and without the request, with predicted lengths and no further arrivals.

`joining_gain` is the change of QoS in such runs, including the QoS of the request itself. The planning routers use it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxroute.environment.qos import QosRule
from jaxroute.environment.settings import Settings
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.cluster import AFTER_ALL, run_until
from jaxroute.simulator.disciplines import rules
from jaxroute.simulator.engine import IGNORED, NEVER, EngineParams, EngineState, prefix_sum, target_tokens, total
from jaxroute.simulator.latency import iteration_time, prefill_time
from jaxroute.simulator.prefix_runs import path_of
from jaxroute.simulator.slots import append
from jaxroute.workload.request import Prefix


def action_penalty(settings: Settings, state: EnvState, action: jax.Array, params: EnvParams) -> jax.Array:
    """The penalty, float [B], of sending the arriving request to the expert `action` (int32 [B]); environments last."""
    if settings.penalty == "off":
        return jnp.zeros(action.shape, float)
    request = state.request
    lengths = request.output_tokens if settings.penalty == "paper" else request.predicted_output_tokens
    engine, queued, engine_params, output_tokens = _of_expert(
        action, (state.engines, state.queued, params.engines, lengths)
    )
    queue = Queue(
        engine=engine,
        age=-queued.arrival,
        score=queued.score,
        predicted_score=queued.predicted_score,
        predicted_tokens=queued.predicted_tokens,
        prompt_tokens=request.prompt_tokens,
        output_tokens=output_tokens,
        prefix=request.prefix,
    )
    if settings.penalty == "paper":
        k1, k2 = _of_expert(action, (params.penalty_prefill, params.penalty_context))
        return paper_impact(queue, engine.target_tokens, k1, k2, params.qos_rule)
    impact = exact_impact if settings.penalty == "exact" else predicted_impact
    return impact(queue, params.qos_rule, engine_params)


def _of_expert(expert: jax.Array, tree: Any) -> Any:
    """Selects from leaves [..., N, B] each environment's `expert` (int32 [B], clipped to 0..N-1): leaves [..., B]."""

    def select(leaf: jax.Array) -> jax.Array:
        chosen = leaf[..., 0, :]
        for other in range(1, leaf.shape[-2]):
            chosen = jnp.where(expert >= other, leaf[..., other, :], chosen)
        return chosen

    return jax.tree.map(select, tree)


class Queue(struct.PyTreeNode):
    """An expert's queue and the request that may join it."""

    engine: EngineState
    age: jax.Array  # float [S, ...], s since arrival
    score: jax.Array  # float [S, ...], true
    predicted_score: jax.Array  # float [S, ...]
    predicted_tokens: jax.Array  # int32 [S, ...]
    prompt_tokens: jax.Array  # int32 [...], of the request that may join
    output_tokens: jax.Array  # int32 [...], its predicted length, or for `paper_impact` its true length
    prefix: Prefix | None = None  # [K, ...], what it shares with others


def expected_length(predicted_tokens: jax.Array, generated: jax.Array) -> jax.Array:
    """Expected output length, int32: max(prediction, generated + 1)."""
    return jnp.maximum(predicted_tokens, generated + 1)


def decode_time(engine: EngineState, params: EngineParams) -> jax.Array:
    """Seconds of a decode iteration of the running batch with one more request, float [...]."""
    running = engine.unfinished() & (engine.position < engine.num_running)
    batch = total(running) + 1
    context = total(jnp.where(running, engine.computed, 0))
    return iteration_time(params.latency, jnp.int32(0), batch, (context + batch).astype(engine.clock.dtype))


class WaitingLine(NamedTuple):
    """What the requests of an engine's queue wait for, each [S, ...]."""

    running: jax.Array  # bool, is not waiting
    held: jax.Array  # int32, tokens in the cache; those of a waiting request once it runs
    blocks: jax.Array  # int32, KV blocks of the requests up to and including this one
    prefill_time: jax.Array  # float, s, the prefills of waiting requests up to and including this one
    unseated: jax.Array  # bool, waits until a running request ends, because seats or blocks run out before it

    def turnover(self, iteration: jax.Array, remaining: jax.Array) -> jax.Array:
        """Mean time between two completions, s [...], of running requests with `remaining` tokens [S, ...] each."""
        tokens = total(jnp.where(self.running, remaining, 0))
        return iteration * tokens / jnp.maximum(total(self.running), 1) ** 2


def waiting_line(engine: EngineState, params: EngineParams) -> WaitingLine:
    """The waiting line of an engine, with any trailing axes."""
    unfinished = engine.unfinished()
    running = unfinished & (engine.position < engine.num_running)
    waiting = unfinished & ~running
    tokens = engine.prompt_tokens + engine.generated
    held = jnp.where(running, engine.computed, tokens)
    blocks = prefix_sum(jnp.where(unfinished, rules(params).held_blocks(held, params), 0))
    full = (blocks > rules(params).admissible_blocks(params)) | (prefix_sum(unfinished) > params.max_num_seqs)
    prefills = prefix_sum(jnp.where(waiting, prefill_time(params.latency, tokens), 0))
    return WaitingLine(running, held, blocks, prefills, waiting & full)


def _overlap(remaining: jax.Array, length: jax.Array) -> jax.Array:
    """Number of iterations that a request shares with the joining request after the prefill of the latter."""
    return jnp.maximum(jnp.minimum(remaining, length) - 1, 0)


def _context_sum(prompt: jax.Array, overlap: jax.Array) -> jax.Array:
    """Sum over k = 1..overlap of (prompt + k): context tokens that the joining request adds to these iterations."""
    return overlap * prompt + overlap * (overlap + 1) / 2


def paper_impact(queue: Queue, true_tokens: jax.Array, k1: jax.Array, k2: jax.Array, rule: QosRule) -> jax.Array:
    """The paper's penalty, float [...]: the scores of running requests whose latency per token exceeds the limit.

    `l+ = (k1*p + k2*sum_{k=1..n}(p + k)) / d` with n = max(min(d - o, d_i) - 1, 0). A request is counted if
    l_now + l+ > L, where l_now is the time since its arrival per generated token, or 0 before the first token.
    `true_tokens`, int32 [S, ...], are the true lengths d.
    """
    engine = queue.engine
    running = engine.unfinished() & (engine.position < engine.num_running)
    overlap = _overlap(true_tokens - engine.generated, queue.output_tokens)
    added = k1 * queue.prompt_tokens + k2 * _context_sum(queue.prompt_tokens, overlap)
    so_far = jnp.where(engine.generated > 0, queue.age / jnp.maximum(engine.generated, 1), 0.0)
    length = jnp.maximum(true_tokens, 1)
    missed = so_far + added / length > rule.per_token(length)
    return jnp.sum(jnp.where(running & missed, queue.score, 0.0), axis=0)


def predicted_impact(queue: Queue, rule: QosRule, params: EngineParams) -> jax.Array:
    """Our penalty, float [...]: predicted scores of the requests that the action turns from met to missed.

    It is the paper's formula with predicted lengths d = max(prediction, o + 1), with the expert's own c1, c2 and c3 in
    place of k1, the per-sequence cost and k2, and with l_now per max(o, 1) tokens. The predicted finish of a waiting
    request is the sum of the time until the next iteration, the prefills up to and including its own, and its decode
    iterations with the current batch. If seats or blocks run out before it, a turnover is added for it and for each
    such request ahead of it: the mean remaining time of running requests divided by their number, which is the mean
    time between two of their completions.
    """
    engine, latency = queue.engine, params.latency
    length = expected_length(queue.predicted_tokens, engine.generated)
    remaining = length - engine.generated
    overlap = _overlap(remaining, queue.output_tokens)
    added = (
        prefill_time(latency, queue.prompt_tokens)
        + latency.per_decode * overlap
        + latency.per_context_token * _context_sum(queue.prompt_tokens, overlap)
    ) / length

    iteration = decode_time(engine, params)
    line = waiting_line(engine, params)
    begun = jnp.maximum(engine.clock, 0)
    turnover = line.turnover(iteration, remaining)
    finish = queue.age + begun + line.prefill_time + turnover * prefix_sum(line.unseated) + iteration * remaining
    so_far = queue.age / jnp.maximum(engine.generated, 1)
    without = jnp.where(line.running, so_far, finish / length)
    limit = rule.per_token(length)
    turned = engine.unfinished() & (without < limit) & (without + added >= limit)
    return jnp.sum(jnp.where(turned, queue.predicted_score, 0.0), axis=0)


def exact_impact(queue: Queue, rule: QosRule, params: EngineParams) -> jax.Array:
    """Like `predicted_impact`, with latencies from two runs of the engine until it is empty; float [...]."""
    engine = predicted_engine(queue.engine, queue.predicted_tokens, params)
    lengths = queue.prompt_tokens, queue.output_tokens
    without, joined = _met(engine, queue.age, *lengths, rule, params, queue.prefix)
    return jnp.sum(jnp.where(without & ~joined, queue.predicted_score, 0.0), axis=0)


def joining_gain(
    engine: EngineState,
    age: jax.Array,
    score: jax.Array,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    own_score: jax.Array,
    rule: QosRule,
    params: EngineParams,
    prefix: Prefix | None = None,
) -> jax.Array:
    """QoS that a request adds to the engine's, float [...]: its own QoS, less the QoS that others lose.

    It is computed like `exact_impact`, with the lengths in `engine` and the given scores, float [S, ...] and [...].
    """
    without, joined = _met(engine, age, prompt_tokens, output_tokens, rule, params, prefix)
    score = jnp.where(engine.position == engine.num_requests, own_score, score)
    return jnp.sum(jnp.where(joined, score, 0.0) - jnp.where(without, score, 0.0), axis=0)


def joining_finish(
    engine: EngineState,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    params: EngineParams,
    prefix: Prefix | None = None,
) -> jax.Array:
    """When a request of these lengths finishes if it joins now, s from now, float [...]; NEVER if it cannot.

    It is computed like `exact_impact`, with the lengths in `engine`.
    """
    joined = _joined(engine, prompt_tokens, output_tokens, params, prefix)
    done, *_ = run_until(joined, jnp.asarray(AFTER_ALL, float), params)
    finish = jnp.where((done.position == engine.num_requests) & joined.unfinished(), done.finish_time, NEVER).min(0)
    return jnp.where(finish == IGNORED, NEVER, finish)


def predicted_engine(engine: EngineState, predicted_tokens: jax.Array, params: EngineParams) -> EngineState:
    """The engine with expected instead of true lengths, from predictions int32 [S, ...]."""
    length = expected_length(predicted_tokens, engine.generated)
    target = _target(engine.prompt_tokens, length, params)
    return engine.replace(target_tokens=jnp.maximum(target, engine.generated + 1))


def _room(params: EngineParams) -> jax.Array:
    """Maximum length of a request, prompt and output, that fits into the cache."""
    return params.usable_blocks * params.block_size + 1


def _target(prompt_tokens: jax.Array, length: jax.Array, params: EngineParams) -> jax.Array:
    """`target_tokens`, limited to what fits into the cache: the engine would preempt a longer request forever."""
    target = target_tokens(prompt_tokens, length, rules(params).longest(params))
    return jnp.minimum(target, _room(params) - prompt_tokens)


def _joined(
    engine: EngineState,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    params: EngineParams,
    prefix: Prefix | None,
) -> EngineState:
    """The engine with a request of these lengths in the slot behind the others, if there is room for it."""
    joins = (engine.num_requests < engine.num_slots) & (prompt_tokens < _room(params))
    target, now = _target(prompt_tokens, output_tokens, params), jnp.zeros((), float)
    path = None if prefix is None or not params.prefix_pieces else path_of(prefix, params)
    return append(engine, joins, prompt_tokens, target, now, path=path)


def _met(
    engine: EngineState,
    age: jax.Array,
    prompt_tokens: jax.Array,
    output_tokens: jax.Array,
    rule: QosRule,
    params: EngineParams,
    prefix: Prefix | None,
) -> tuple[jax.Array, jax.Array]:
    """Which requests meet the limit if the engine runs until it is empty with no further arrivals, bool [S, ...] each:
    without a request of these lengths, and with it in the slot behind the others.
    """
    joined = _joined(engine, prompt_tokens, output_tokens, params, prefix)
    # Both runs at once: [S, 2, ...] and [2, ...].
    axes = engine.num_requests.ndim
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=leaves[0].ndim - axes), engine, joined)
    done, *_ = run_until(both, jnp.asarray(AFTER_ALL, float), params)
    age = jnp.where(engine.position < engine.num_requests, age, 0)[:, None]
    finish = jnp.where(done.finish_time == IGNORED, NEVER, done.finish_time)
    met = both.unfinished() & rule.met(done.first_token_time + age, finish + age, both.target_tokens)
    return met[:, 0], met[:, 1]
