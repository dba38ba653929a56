"""Where training starts, and what it keeps: a linear policy found by CMA-ES, and validation of greedy policies."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxroute.cma_es import ALL, EACH, Search, devices_for, over_devices
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import RoutingGraph, expert_features
from jaxroute.environment.state import EnvParams
from jaxroute.evaluation.episodes import for_search, run_episodes
from jaxroute.routers.choice import Router
from jaxroute.routers.linear import linear_policy

FIRST_GUESS = {
    "expected_qos": 1.0,
    "impact": -1.0,
    "running": -0.02,
    "waiting": -0.02,
    "batch_use": -0.05,
    "latency_use": -0.05,
}
"""Weights with which the search begins: the QoS that the request gains, less what others lose, less a price of load.
Those of other features and of dropping begin at 0."""

_SPREAD = 0.1  # standard deviation, in the first generation, of what a feature adds to the value of an action
_POPULATION, _EPISODES, _LENGTH = 24, 2, 1500  # of a generation; requests of an episode
_DISTURBED_LENGTH = 3000  # requests of an episode with disturbances, whose effects last for hundreds
_CLUSTERS = 12  # episodes of a generation where the engines of training environments differ
_DIFFERENT_LENGTH = 600  # requests of an episode where training environments differ, so that a generation has more
_SEEN_EPISODES, _SEEN_STEPS = 32, 300  # in which the features' standard deviations are measured
_SMALLEST = 1e-3  # standard deviation at which a feature counts as constant
_SEARCH_KEY, _VALIDATION_KEY = 0x73746172, 0x76616C69  # no evaluation's keys come from them
QOS_OF_LOGIT = 0.05  # about the QoS of a difference of 1 between two logits


def linear_start(
    env: RoutingEnvironment,
    params: EnvParams,
    axes: EnvParams | None,
    decisions: int,
    seed: int,
    done: Callable[[int, float, np.ndarray], None] = lambda decisions, qos, values: None,
    first: np.ndarray | None = None,
    known: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """Weights float32 [Fe + 1] of the linear policy (`router_network.with_linear_policy`) with the highest mean QoS.

    The search is CMA-ES with `decisions` simulated decisions in all, on new episodes in each generation. The standard
    deviation of a weight in its first generation is inverse to that of the feature under `FIRST_GUESS`, for which 9,600
    further decisions are simulated: a feature may vary by hundredths in one cluster and by tens in another. `params`
    and `axes` are those of the training environments. Where these differ, a generation has some of them, which are
    spread over all of them (`spread_rows`). Where the engines differ, it has the next clusters in turn, and all of them
    count alike: a policy's QoS in one is taken relative to the mean and the standard deviation of the generation there.
    `done` is called after each generation with the number of decisions, the generation's mean QoS, and the values by
    which its policies were compared, float32 [P]. `known` are these values of the first generations of a search with
    the same arguments, which are not simulated again. `first`, float [Fe + 1], are weights as this function returns
    them, with which the search begins instead of `FIRST_GUESS`.
    """
    environments = _rows(params, axes)
    differ = axes is not None and bool(jax.tree.leaves(axes.engines))
    length = _DIFFERENT_LENGTH if environments > 1 else length_of_search(params)
    env, params = for_search(env, params, length)
    episodes = _CLUSTERS if differ else _EPISODES * _LENGTH // length
    per_generation = _POPULATION * episodes * env.episode_length
    names = expert_features(env)
    guess = np.array([*(FIRST_GUESS.get(name, 0.0) for name in names), 0.0])
    origin = guess if first is None else np.asarray(first, np.float64) * QOS_OF_LOGIT
    key = jax.random.fold_in(jax.random.key(seed), _SEARCH_KEY)
    rows, own_axes = rows_of(params, axes, _SEEN_EPISODES)
    keys = jax.random.split(jax.random.fold_in(key, _SEEN_STEPS), _SEEN_EPISODES)
    seen_env, rows = for_search(env, rows, _SEEN_STEPS + 1)
    seen = _feature_spread(seen_env, own_axes, jnp.asarray(origin, jnp.float32), keys, rows)
    spread = np.append(np.maximum(np.asarray(seen, np.float64), _SMALLEST), 1.0)
    search = Search(origin, _SPREAD / spread, _POPULATION, seed)
    generations = max(1, decisions // per_generation)
    order = np.random.default_rng(seed).permutation(environments)
    for generation in range(generations):
        points = search.ask()
        if generation < len(known):
            search.tell(-np.asarray(known[generation]))
            continue
        keys = jax.random.split(jax.random.fold_in(key, generation), episodes)
        if differ:
            places = order[(generation * episodes + np.arange(episodes)) % environments]
            weights = jnp.asarray(points, jnp.float32)
            qos = np.asarray(_linear_qos_in_turn(env, own_axes, weights, keys, jnp.asarray(places), params))
            told = ((qos - qos.mean(1, keepdims=True)) / (qos.std(1, keepdims=True) + _SMALLEST)).mean(0)
        else:
            rows = picked(own_axes, params, spread_rows(environments, episodes, generation))
            told = qos = np.asarray(_linear_qos(env, own_axes, jnp.asarray(points, jnp.float32), keys, rows))
        search.tell(-told)
        done((generation + 1) * per_generation, float(qos.mean()), told)
    # A policy is the same for any positive factor. This one makes a unit of value about a unit of QoS.
    weights = search.mean
    scores = weights[[names.index("expected_qos"), names.index("predicted_score")]]
    unit = max(scores[0] + 4 * scores[1], float(np.linalg.norm(weights * spread)))
    return np.asarray(weights / unit / QOS_OF_LOGIT, np.float32)


def length_of_search(params: EnvParams) -> int:
    """Requests of an episode in which policies are searched, compared and validated."""
    return _LENGTH if params.disturbances is None else _DISTURBED_LENGTH


class Validator:
    """Mean QoS of greedy policies on the same episodes, none of which a training or an evaluation has."""

    def __init__(self, env: RoutingEnvironment, params: EnvParams, axes: EnvParams | None, decisions: int):
        self._env, params = for_search(env, params, length_of_search(params))
        self._episodes = max(1, decisions // self._env.episode_length)
        self._keys = jax.random.split(jax.random.key(_VALIDATION_KEY), self._episodes)
        self._rows, self._axes = rows_of(params, axes, self._episodes)

    def qos(self, router: Router) -> float:
        """Mean QoS of the episodes; `router` is a pytree, so that policies of one network share a program."""
        return float(_validate(self._env, self._axes, router, self._keys, self._rows))


def spread_rows(environments: int, count: int, generation: int) -> np.ndarray:
    """Rows, int64 [count], of `environments`: one of each of `count` equal parts, at another place in each generation.

    The places follow the golden ratio, so that some generations have the ends, and all together every row.
    """
    place = generation * (np.sqrt(5) - 1) / 2 % 1
    return ((np.arange(count) + place) / count * environments).astype(int)


def rows_of(params: EnvParams, axes: EnvParams | None, count: int) -> tuple[EnvParams, EnvParams]:
    """`params` in which leaves that differ between environments have `count` rows, evenly spread; and all axes, whose
    leaves are numbers and None, so that they can be a static argument.
    """
    own: EnvParams = jax.tree.map(lambda _: None, params) if axes is None else axes
    places = np.linspace(0, _rows(params, axes) - 1, count + 2).round().astype(int)[1:-1]
    return picked(own, params, places), own


def picked(axes: EnvParams, params: EnvParams, places: Any) -> EnvParams:
    """`params` in which leaves that differ between environments have the row or rows `places` (int32) only."""
    found: EnvParams = jax.tree.map(
        lambda axis, leaf: leaf if axis is None else leaf[places], axes, params, is_leaf=lambda axis: axis is None
    )
    return found


def _rows(params: EnvParams, axes: EnvParams | None) -> int:
    """Rows of the leaves that differ between environments; 1 without any."""
    if axes is None:
        return 1
    counts = jax.tree.map(
        lambda axis, leaf: None if axis is None else len(leaf), axes, params, is_leaf=lambda axis: axis is None
    )
    return next(iter(jax.tree.leaves(counts)), 1)


def _qos(env: RoutingEnvironment, router: Router, key: jax.Array, params: EnvParams) -> jax.Array:
    """QoS, float [], of the episode of `key`."""
    return run_episodes(env, [router], jnp.int32(0), key[None], params)["qos"][0]


def _episode_qos(
    env: RoutingEnvironment, axes: EnvParams, router: Router, keys: jax.Array, rows: EnvParams
) -> jax.Array:
    return jax.vmap(partial(_qos, env, router), (0, axes))(keys, rows).mean()


_validate = jax.jit(_episode_qos, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1))
def _linear_qos(
    env: RoutingEnvironment, axes: EnvParams, weights: jax.Array, keys: jax.Array, rows: EnvParams
) -> jax.Array:
    """Mean QoS, float [P], of the linear policies with `weights` [P, Fe + 1] on the same episodes."""

    def of(weights: jax.Array) -> jax.Array:
        return _episode_qos(env, axes, jax.tree_util.Partial(linear_policy, weights), keys, rows)

    return jax.vmap(of)(weights)


@partial(jax.jit, static_argnums=(0, 1))
def _linear_qos_in_turn(
    env: RoutingEnvironment,
    axes: EnvParams,
    weights: jax.Array,
    keys: jax.Array,
    places: jax.Array,
    params: EnvParams,
) -> jax.Array:
    """QoS, float [K, P], of the linear policies with `weights` [P, Fe + 1], in the episode of each of the K keys.

    `params` are those of all environments, and `places`, int32 [K], say which of them an episode has. Episodes come one
    after the other, since in one batch every step would wait for the slowest cluster.
    """

    def run(weights: jax.Array, keys: jax.Array, places: jax.Array, params: EnvParams) -> jax.Array:
        def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            key, place = inputs
            own = picked(axes, params, place)

            return jax.vmap(lambda weights: _qos(env, jax.tree_util.Partial(linear_policy, weights), key, own))(weights)

        return jax.lax.map(one, (keys, places))

    outputs = PartitionSpec(None, "device")
    run = over_devices(run, devices_for(len(weights)), inputs=(EACH, ALL, ALL, ALL), outputs=outputs)
    return run(weights, keys, places, params)


@partial(jax.jit, static_argnums=(0, 1))
def _feature_spread(
    env: RoutingEnvironment, axes: EnvParams, weights: jax.Array, keys: jax.Array, rows: EnvParams
) -> jax.Array:
    """Standard deviations, float32 [Fe], of the experts' features under the linear policy with `weights` [Fe + 1]."""
    step_keys = jax.vmap(partial(jax.random.split, num=_SEEN_STEPS))(keys)
    policy = jax.vmap(partial(linear_policy, weights), (0, 0, 0, axes))
    step = jax.vmap(env.step, (0, 0, 0, axes))

    def move(carry: tuple[RoutingGraph, Any], keys: jax.Array) -> tuple[tuple[RoutingGraph, Any], jax.Array]:
        observation, state = carry
        observation, state, *_ = step(keys, state, policy(keys, observation, state, rows), rows)
        return (observation, state), observation.expert

    begun = jax.vmap(env.reset, (0, axes))(keys, rows)
    _, features = jax.lax.scan(move, begun, jnp.moveaxis(step_keys, 1, 0))
    return features.std((0, 1, 2))
