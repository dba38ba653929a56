"""What a router observes: the arriving request, the experts and the heads of their queues, as arrays of fixed size.

No observation is computed from true output lengths or scores.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from jaxroute.environment.forecast import forecast, tokens_to_prefill
from jaxroute.environment.impact import decode_time, expected_length
from jaxroute.environment.relative import relative_features
from jaxroute.environment.settings import Features, QueueNodes, Settings
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.simulator.disciplines import rules, used_blocks

ARRIVED_FEATURES = ("prompt_tokens", "recent_load")
EXPERT_FEATURES = (
    "kv_use",
    "running",
    "waiting",
    "iteration_time",
    "predicted_score",
    "predicted_tokens",
    "predicted_latency",
    "expected_qos",
    "impact",
    "at_risk",
    "joined_iteration_time",
    "remaining_tokens",
    "prefill_time",
)
RELATIVE_FEATURES = (
    "predicted_score",
    "expected_qos",
    "impact",
    "at_risk",
    "batch_use",
    "batch_use_squared",
    "latency_use",
    "latency_use_squared",
    "kv_ahead",
    "kv_ahead_squared",
    "demand",
    "demand_squared",
    "impact_by_demand",
    "prefill_ahead",
    "slack_taken",
    "least_latency_use",
)
"""Names of an expert's features with `Settings.features` "relative", instead of `EXPERT_FEATURES` (`relative`)."""

PREFIX_FEATURE = "prefix_share"
REQUEST_FEATURES = (
    "prompt_tokens",
    "predicted_score",
    "predicted_tokens",
    "kv_use",
    "generated_tokens",
    "latency_so_far",
    "predicted_latency",
)
"""Names of the features, in order. Tokens are divided by `token_scale`, queue lengths by K or FULL_SCALE, and times per
token by the latency limit; scores are (s - 0.5) * 4, and KV use is a share of the expert's cache. Times are then mapped
by x / (1 + x), so the limit is at 0.5. `recent_load` is mapped in the same way, with x the number of arrivals at the
recent rate in the time that `token_scale` output tokens may take, divided by N and by K or FULL_SCALE. It is 0 at the
first decision of an episode, because no rate is known yet. The last six features of an expert are those of
`forecast.Forecast`, over its whole queue. Mapped by x / (1 + x) are `at_risk`, `joined_iteration_time` relative to the
limit, `remaining_tokens` relative to K requests of `token_scale` tokens, and `prefill_time` relative to K limits. Where
prompts share prefixes (`Settings.prefix_share`), an expert has `PREFIX_FEATURE` behind these: the share of the arriving
prompt that it holds."""


def expert_features(settings: Settings) -> tuple[str, ...]:
    """Names of an expert's features."""
    names = RELATIVE_FEATURES if settings.features == "relative" else EXPERT_FEATURES
    return names if settings.prefix_share == "off" else (*names, PREFIX_FEATURE)


FULL_SCALE = 10
"""Takes the place of K in features that are relative to K, if all requests are observed. It is the default of
`queue_nodes`, so the same state has the same features of arrived node and experts in both cases, and a network's
weights work with both. The number of slots would be no measure of load: it is reserved memory, most of it empty."""


class GraphObservation(flax.struct.PyTreeNode):
    """The routing graph of one decision (simulation.md section 5). N experts, K nodes per queue; features of order 1.

    All fields are traced. Shapes are without batch axes, of which any number may come first.
    """

    arrived: jax.Array  # float32 [Fa]: features of the arriving request that do not depend on the expert
    expert: jax.Array  # float32 [N, Fe]: the expert's load, and its predictions for the arriving request
    running: jax.Array  # float32 [N, K, Fq]: the first K running requests of each expert
    waiting: jax.Array  # float32 [N, K, Fq]: the first K waiting requests of each expert
    running_mask: jax.Array  # bool [N, K]: True = a request; features at False must not affect a result
    waiting_mask: jax.Array  # bool [N, K]
    action_mask: jax.Array  # bool [N + 1]: True = allowed; the last action drops the request


class FullGraphObservation(flax.struct.PyTreeNode):
    """Like `GraphObservation`, but with all requests of each expert, in S slots that both queues share.

    An expert never holds more than S requests, so none is left out. All fields are traced.
    """

    arrived: jax.Array  # float32 [Fa]
    expert: jax.Array  # float32 [N, Fe]
    queued: jax.Array  # float32 [N, S, Fq]: the requests of each expert, running ones first
    running_mask: jax.Array  # bool [N, S]: True = a running request
    waiting_mask: jax.Array  # bool [N, S]: True = a waiting request; slots with False in both must not affect a result
    action_mask: jax.Array  # bool [N + 1]

    @property
    def running(self) -> jax.Array:
        """float32 [N, S, Fq], as in `GraphObservation`; `running_mask` marks the running requests."""
        return self.queued

    @property
    def waiting(self) -> jax.Array:
        """float32 [N, S, Fq], as in `GraphObservation`; `waiting_mask` marks the waiting requests."""
        return self.queued


RoutingGraph = GraphObservation | FullGraphObservation


def _squash(ratio: jax.Array) -> jax.Array:
    return ratio / (1 + ratio)


def _score(score: jax.Array) -> jax.Array:
    return (score - 0.5) * 4


def action_mask(state: EnvState, params: EnvParams, slots: int, drop: bool = True) -> jax.Array:
    """bool [N + 1, ...]. An expert is allowed if one of its `slots` is free and it could hold the prompt and one token.
    Dropping is always allowed or, without `drop`, only if no expert is."""
    engines, prompt = params.engines, state.request.prompt_tokens
    fits = rules(engines).can_serve(prompt, jnp.int32(1), engines)
    allowed = fits & (state.engines.num_requests < slots)
    dropped = jnp.ones_like(allowed[:1]) if drop else ~allowed.any(axis=0, keepdims=True)
    return jnp.concatenate([allowed, dropped])


def observe(
    state: EnvState,
    params: EnvParams,
    queue_nodes: QueueNodes,
    slots: int,
    drop: bool = True,
    features: Features = "standard",
    prefix_share: jax.Array | None = None,
) -> RoutingGraph:
    """The observation of environments, whose axis B is the last of `state`. Fields of the result are [B, ...].

    If `queue_nodes` is a number K, the result is a `GraphObservation`. If it is "all", the result is a
    `FullGraphObservation` with S = `slots`, and features that are relative to K are relative to FULL_SCALE instead.
    The fields of `state` may have any number of slots that is enough for all requests. `features` selects those of the
    experts (`expert_features`), and `prefix_share`, float [N, B], is a further one.
    """
    engine, queued, request, scale = state.engines, state.queued, state.request, params.token_scale
    iteration = decode_time(engine, params.engines)
    qos_rule = params.qos_rule
    own_limit = qos_rule.per_token(request.predicted_output_tokens)
    start = jnp.maximum(engine.clock, 0)
    waiting = engine.num_requests - engine.num_running
    rows_seen, per_queue = (slots, FULL_SCALE) if queue_nodes == "all" else (queue_nodes, queue_nodes)
    node = jnp.arange(rows_seen, dtype=jnp.int32)[:, None, None]

    def queue_features(rows: Callable[[jax.Array], jax.Array], count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features, float32 [B, N, K, Fq], of the first `count` [N, B] requests in `rows(leaf)` [K, N, B], and mask."""
        arrival, generated, predicted = rows(queued.arrival), rows(engine.generated), rows(queued.predicted_tokens)
        length = expected_length(predicted, generated)
        finish = start - arrival + iteration * (length - generated)
        blocks = rules(params.engines).held_blocks(rows(engine.computed), params.engines)
        limit = qos_rule.per_token(length)
        features = (
            rows(engine.prompt_tokens) / scale,
            _score(rows(queued.predicted_score)),
            predicted / scale,
            blocks / params.engines.usable_blocks,
            generated / scale,
            _squash(-arrival / jnp.maximum(generated, 1) / limit),
            _squash(finish / length / limit),
        )
        mask = node < count
        stacked = jnp.stack([jnp.where(mask, feature, 0).astype(jnp.float32) for feature in features])
        return stacked.transpose(3, 2, 1, 0), mask.transpose(2, 1, 0)

    ahead = forecast(state, params, prefix_share)
    forecast_features = ahead.expected_qos, ahead.impact, _squash(ahead.at_risk)
    prefill = params.engines.latency.per_prefill_token * tokens_to_prefill(request, prefix_share)
    finish = start + prefill + iteration * request.predicted_output_tokens
    expert = (
        used_blocks(engine, params.engines) / params.engines.usable_blocks,
        engine.num_running / per_queue,
        waiting / per_queue,
        _squash(iteration / own_limit),
        _score(request.predicted_score),
        request.predicted_output_tokens / scale,
        _squash(finish / request.predicted_output_tokens / own_limit),
        *forecast_features,
        _squash(ahead.iteration_time / own_limit),
        _squash(ahead.remaining_tokens / per_queue / scale),
        _squash(ahead.prefill_time / own_limit / per_queue),
    )
    if features == "relative":
        expert = (
            _score(request.predicted_score),
            *forecast_features,
            *relative_features(state, params, ahead, prefix_share),
        )
    if prefix_share is not None:
        expert = (*expert, prefix_share)
    node_time = qos_rule.per_token(scale) * scale / (engine.num_requests.shape[0] * per_queue)
    recent_load = jnp.where(state.step > 0, node_time / (node_time + state.recent_gap), 0)
    heads = {
        "arrived": jnp.stack([request.prompt_tokens / scale, recent_load], axis=-1).astype(jnp.float32),
        "expert": jnp.stack(jnp.broadcast_arrays(*expert)).astype(jnp.float32).transpose(2, 1, 0),
        "action_mask": action_mask(state, params, slots, drop).T,
    }
    running_features, running_mask = queue_features(lambda leaf: _rows(leaf, rows_seen), engine.num_running)
    if queue_nodes == "all":
        nodes, mask = queue_features(lambda leaf: _rows(leaf, slots), engine.num_requests)
        return FullGraphObservation(queued=nodes, running_mask=running_mask, waiting_mask=mask & ~running_mask, **heads)
    nodes, mask = queue_features(lambda leaf: _rows_from(leaf, engine.num_running, rows_seen), waiting)
    return GraphObservation(
        running=running_features, waiting=nodes, running_mask=running_mask, waiting_mask=mask, **heads
    )


def _rows(leaf: jax.Array, count: int) -> jax.Array:
    """The first `count` slots of `leaf` [S, N, B], with zeros after its last slot."""
    return jnp.pad(leaf[:count], ((0, max(count - leaf.shape[0], 0)), (0, 0), (0, 0)))


def _rows_from(leaf: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """The `count` slots of `leaf` [S, N, B] that begin at `start` (int32 [N, B], below S).

    Slots after the last one have arbitrary values. The slots are shifted by powers of two, with one select for each,
    because a gather takes ten times as long on a CPU.
    """
    shift = 1 << (leaf.shape[0] - 1).bit_length()
    while shift > 1:
        shift //= 2
        leaf = _rows(leaf, count + 2 * shift - 1)
        leaf = jnp.where(start & shift, leaf[shift:], leaf[:-shift])
    return _rows(leaf, count)


def flatten(observation: RoutingGraph) -> jax.Array:
    """The observation as one vector, float32 [..., F]: all fields in their order, with the batch axes kept."""
    batch = observation.action_mask.shape[:-1]
    leaves = [leaf.astype(jnp.float32).reshape(*batch, -1) for leaf in jax.tree.leaves(observation)]
    return jnp.concatenate(leaves, axis=-1)
