"""Improves the policy that training starts with: decisions are simulated with both of their best actions.

A decision's effect is hidden in the rewards of the next hundred decisions, most of which have other causes. Simulated
twice with the same arrivals, with either action, it is the difference of two sums, and all other causes cancel.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxroute.agent.router_network import RouterNetwork
from jaxroute.agent.sac import policy_logits
from jaxroute.agent.start import QOS_OF_LOGIT, length_of_search, picked, rows_of
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.observation import RoutingGraph
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.evaluation.episodes import for_search
from jaxroute.routers.linear import linear_policy, linear_values
from jaxroute.routers.rollout import action_returns

_ENVIRONMENTS, _COMPARED = 128, 32  # stepped together, and of these compared in a round: the least clear decisions
_BETWEEN = 6  # decisions between two rounds
_ROUNDS = 25  # of one program
_IN_FLIGHT = 2.5  # arrivals that are simulated, relative to the requests at the experts
_SHORTEST, _LONGEST = 20, 150  # arrivals
_NOISIEST = 0.01  # QoS, standard error of a mean over all comparisons: 0.001 on paper-3, 0.011 on rtx4090-3
_EPOCHS, _BATCH, _RATE = 8, 256, 1e-3
_TEMPERATURE = 2.0  # of the actions' probabilities, relative to the policy's
_IMPROVEMENT_KEY = 0x696D7072  # no evaluation's keys come from it


class Comparisons(NamedTuple):
    """L decisions, each with two of its actions compared."""

    observation: RoutingGraph  # leaves [L, ...]
    # float32 [L, N + 1]: QoS of all requests that the action may concern, less the mean of the two that were compared;
    # of another action, what the linear policy's values make of it; 0 if it is forbidden
    lead: jax.Array


class _Walk(NamedTuple):
    """The environments between two programs."""

    keys: jax.Array  # [B], those of each environment, as in `follow_episodes`
    observation: RoutingGraph
    state: EnvState


def compare_actions(
    env: RoutingEnvironment,
    params: EnvParams,
    axes: EnvParams | None,
    weights: jax.Array,
    decisions: int,
    seed: int,
    done: Callable[[int], None] = lambda decisions: None,
) -> Comparisons | None:
    """Comparisons of the two best actions of the linear policy with `weights` (float32 [Fe + 1]), on its own path.

    None if they would be too few for their noise: a network that learns from such comparisons becomes worse. This is
    noticed in the second program, after a few of the decisions.

    The policy is sampled. In each round, the decisions with the smallest difference between the best two values are
    compared: as many further arrivals follow as concern the request, on which the policy decides greedily
    (`rollout.action_returns`), with their true lengths and scores. `decisions` simulated decisions are made in all;
    `params` and `axes` are those of the training environments. `done` is called with the number so far.
    """
    if params.disturbances is not None:
        env, params = for_search(env, params, length_of_search(params))  # some thousand decisions do not reach them
    env = replace(env, metrics="off", penalty="off")
    rows, own_axes = rows_of(params, axes, _ENVIRONMENTS)
    key = jax.random.fold_in(jax.random.key(seed), _IMPROVEMENT_KEY)
    keys = jax.random.split(key, _ENVIRONMENTS)
    observation, state = jax.jit(jax.vmap(env.reset, (0, own_axes)))(keys, rows)
    walk = _Walk(keys, observation, state)
    simulated, parts, horizon = 0, [], jnp.int32(_SHORTEST)
    while simulated < decisions:
        inputs = weights, walk, jax.random.fold_in(key, simulated), rows, horizon
        walk, part, difference, in_flight = _rounds(env, own_axes, *inputs)
        of_program = _ROUNDS * (_ENVIRONMENTS * _BETWEEN + 2 * _COMPARED * (int(horizon) + 1))
        simulated += of_program
        # The horizon of the first program is only a guess.
        if len(parts) == 1 and np.std(difference) > _NOISIEST * np.sqrt(len(difference) * decisions / of_program):
            return None
        parts.append(jax.device_get(part))
        horizon = jnp.int32(np.clip(_IN_FLIGHT * float(in_flight), _SHORTEST, _LONGEST))
        done(min(simulated, decisions))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@partial(jax.jit, static_argnums=(0, 1))
def _rounds(
    env: RoutingEnvironment,
    axes: EnvParams,
    weights: jax.Array,
    walk: _Walk,
    key: jax.Array,
    params: EnvParams,
    horizon: jax.Array,
) -> tuple[_Walk, Comparisons, jax.Array, jax.Array]:
    """`_ROUNDS` rounds; also the difference of each two actions, float [L], and the mean number of requests in a
    cluster, float [].
    """

    policy = jax.tree_util.Partial(linear_policy, weights)

    def decide(walk: _Walk, key: jax.Array) -> tuple[_Walk, None]:
        values = jax.vmap(partial(linear_values, weights))(walk.observation)
        action = jax.random.categorical(key, values).astype(jnp.int32)
        arrivals = jax.vmap(jax.random.fold_in)(walk.keys, walk.state.step)
        observation, state, *_ = jax.vmap(env.step, (0, 0, 0, axes))(arrivals, walk.state, action, params)
        return _Walk(walk.keys, observation, state), None

    def compare(walk: _Walk, key: jax.Array) -> tuple[_Walk, tuple[Comparisons, jax.Array, jax.Array]]:
        walk, _ = jax.lax.scan(decide, walk, jax.random.split(key, _BETWEEN))
        values = jax.vmap(partial(linear_values, weights))(walk.observation)
        best, actions = jax.lax.top_k(values, 2)
        _, chosen = jax.lax.top_k(best[:, 1] - best[:, 0], _COMPARED)
        here = jax.tree.map(lambda leaf: leaf[chosen], walk)
        action = actions[chosen].astype(jnp.int32)
        own = picked(axes, params, chosen)

        def returns(key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams) -> jax.Array:
            return action_returns(env, policy, key, state, params, horizon, action)

        qos = jax.vmap(returns, (0, 0, 0, axes))(here.keys, here.state, action, own)
        found = (qos - qos.mean(axis=1, keepdims=True)).astype(jnp.float32)
        lead = found[:, 1:] + QOS_OF_LOGIT * (values - best[:, 1:])[chosen]
        lead = jnp.where(here.observation.action_mask, lead, 0).at[jnp.arange(_COMPARED)[:, None], action].set(found)
        in_flight = walk.state.engines.num_requests.sum(axis=1).mean()
        return walk, (Comparisons(here.observation, lead), qos[:, 1] - qos[:, 0], in_flight)

    walk, (comparisons, difference, in_flight) = jax.lax.scan(compare, walk, jax.random.split(key, _ROUNDS))
    comparisons = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), comparisons)
    return walk, comparisons, difference.reshape(-1), in_flight.mean()


def improve(network: RouterNetwork, variables: Any, comparisons: Comparisons, seed: int) -> Any:
    """`variables` of the network after gradient ascent on the expected lead of the action that its policy takes.

    It is the policy gradient with both actions' returns known, and no critic between them (Foerster et al. 2018, arXiv
    1705.08926, has the same idea with a learned one).
    """
    count = len(comparisons.lead)
    batch = min(_BATCH, count)
    steps = _EPOCHS * (count // batch)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=1e-4)
    )

    def loss(variables: Any, some: Comparisons) -> jax.Array:
        logits = policy_logits(network, variables, some.observation)
        probability = jax.nn.softmax(logits / _TEMPERATURE)
        return -jnp.sum(probability * some.lead, axis=-1).mean()

    @jax.jit
    def epoch(carry: tuple[Any, Any], order: jax.Array, comparisons: Comparisons) -> tuple[Any, Any]:
        def update(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
            variables, state = carry
            gradient = jax.grad(loss)(variables, jax.tree.map(lambda leaf: leaf[rows], comparisons))
            updates, state = optimizer.update(gradient, state, variables)
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(update, carry, order)[0]

    random = np.random.default_rng(seed)
    carry = variables, optimizer.init(variables)
    comparisons = jax.tree.map(jnp.asarray, comparisons)
    for _ in range(_EPOCHS):
        order = random.permutation(count)[: count // batch * batch].reshape(-1, batch)
        carry = epoch(carry, jnp.asarray(order), comparisons)
    return carry[0]
