"""Collection and learning as one compiled program: environments, replay buffer and updates inside one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_batching import custom_vmap

from jaxroute.agent import replay_buffer, sac
from jaxroute.agent.replay_buffer import ReplayBuffer
from jaxroute.agent.sac import Hyperparameters, LearnerState, Transition, UpdateMetrics


@dataclass(frozen=True)
class SACConfig:
    """The static options, on which shapes depend; everything else is in `Hyperparameters`."""

    num_envs: int  # environments stepped together
    buffer_capacity: int  # transitions, a multiple of num_envs
    batch_size: int
    updates_per_step: int  # gradient updates after each collection step of num_envs transitions
    steps_per_chunk: int  # collection steps of one call of train_chunk


class TrainState(struct.PyTreeNode):
    """The whole state of training. All traced."""

    learner: LearnerState
    buffer: ReplayBuffer
    env_state: Any  # each leaf [num_envs, ...]
    observation: Any  # of env_state, each leaf [num_envs, ...]
    returns: jax.Array  # float32 [num_envs], sum of the rewards of each current episode
    key: jax.Array
    steps: jax.Array  # int32 []: collection steps so far; a step is num_envs frames


# in_axes and out_axes of a TrainState when seeds, hyperparameters or environment parameters are vmapped. The counters
# are the same for all trainings and stay unbatched, so that a write to the buffer remains a slice update. If
# warmup_frames is unbatched too, the number of turns of the update loop remains unbatched.
TRAIN_STATE_AXES = TrainState(
    learner=0,  # pyright: ignore[reportArgumentType]
    buffer=ReplayBuffer(observations=0, outcomes=0, rows_added=None),  # pyright: ignore[reportArgumentType]
    env_state=0,
    observation=0,
    returns=0,  # pyright: ignore[reportArgumentType]
    key=0,  # pyright: ignore[reportArgumentType]
    steps=None,  # pyright: ignore[reportArgumentType]
)


class StoredStep(NamedTuple):
    """The fields of `sac.Transition` that the buffer stores in addition to observations."""

    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    elapsed: jax.Array


class Trainer(NamedTuple):
    """Two compiled functions. Both may be vmapped (TRAIN_STATE_AXES); apply `jax.jit` again, with the state donated.

    `init(key, env_params, hyper) -> TrainState`.
    `train_chunk(train_state, env_params, hyper) -> (TrainState, metrics)`: `steps_per_chunk` collection steps, each
    followed by `updates_per_step` updates once warm-up is over. The state that is passed in is donated, so it cannot
    be used again. Metrics are float32 [] means over the chunk, in a dict:

    - reward, qos, penalty: per decision, so qos is the running QoS per request
    - drop_rate: fraction of the decisions
    - the fields of sac.UpdateMetrics: per update; NaN without updates
    - episodes: number of episodes that ended
    - return: sum of an episode's rewards, averaged over these episodes; NaN without any
    - episode: the environment's info["episode"], averaged over these episodes (a pytree; NaN without any)
    """

    init: Callable[[jax.Array, Any, Hyperparameters], TrainState]
    train_chunk: Callable[[TrainState, Any, Hyperparameters], tuple[TrainState, dict[str, Any]]]


def make_trainer(env: Any, network: nn.Module, config: SACConfig, params_axes: Any = None) -> Trainer:
    """The training program of a network (see `sac`) and a routing environment, or one with the same interface.

    `params_axes` are the `in_axes` of the environment's parameters, if they differ between environments.
    """

    def init(key: jax.Array, env_params: Any, hyper: Hyperparameters) -> TrainState:
        key, env_key, network_key = jax.random.split(key, 3)
        observation, env_state = jax.vmap(env.reset, (0, params_axes))(
            jax.random.split(env_key, config.num_envs), env_params
        )
        zeros = jnp.zeros(config.num_envs)
        reals, flags = zeros.astype(jnp.float32), zeros.astype(bool)
        outcome = StoredStep(zeros.astype(jnp.int32), reals, flags, flags, reals)
        return TrainState(
            learner=sac.init(network_key, network, jax.tree.map(lambda x: x[0], observation), hyper),
            buffer=replay_buffer.init(observation, outcome, config.buffer_capacity),
            env_state=env_state,
            observation=observation,
            returns=jnp.zeros(config.num_envs, jnp.float32),
            key=key,
            steps=jnp.zeros((), jnp.int32),
        )

    def learn(
        learner: LearnerState, buffer: ReplayBuffer, key: jax.Array, updates: jax.Array, hyper: Hyperparameters
    ) -> tuple[LearnerState, UpdateMetrics]:
        """The learner after `updates` updates on batches from the buffer, and the sums of their metrics."""

        def one(index: jax.Array, carry: tuple[LearnerState, UpdateMetrics]) -> tuple[LearnerState, UpdateMetrics]:
            learner, sums = carry
            observation, outcome, following = replay_buffer.sample(
                buffer, jax.random.fold_in(key, index), config.batch_size
            )
            batch = Transition(observation, **outcome._asdict(), next_observation=following)
            learner, metrics = sac.update(network, learner, batch, hyper)
            return learner, jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, metrics)

        zero = UpdateMetrics(**{name: jnp.zeros((), jnp.float32) for name in UpdateMetrics.__dataclass_fields__})
        return jax.lax.fori_loop(0, updates, one, (learner, zero))

    def step(state: TrainState, env_params: Any, hyper: Hyperparameters) -> tuple[TrainState, dict[str, Any]]:
        """One transition in each environment, then the updates. `train_chunk` averages the metrics over its steps."""
        key, action_key, env_key, sample_key = jax.random.split(state.key, 4)
        # Compared in steps, because the number of frames could exceed the range of int32.
        warming_up = state.steps < (hyper.warmup_frames + config.num_envs - 1) // config.num_envs

        # Before the first update this is the policy that training starts with, near uniform if it starts with none.
        logits = sac.policy_logits(network, state.learner.params, state.observation)
        action = jax.random.categorical(action_key, logits).astype(jnp.int32)
        observation, env_state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, params_axes))(
            jax.random.split(env_key, config.num_envs), state.env_state, action, env_params
        )
        reward = reward.astype(jnp.float32)  # the buffer's dtype, also if the environment computes in 64 bits
        elapsed = jnp.asarray(info.get("elapsed", jnp.ones_like(reward)), jnp.float32)
        outcome = StoredStep(action, reward, terminated, truncated, elapsed)
        buffer = replay_buffer.add(state.buffer, outcome, observation)
        # During warm-up, the loop has no turns. A branch instead would copy the learner.
        updates = jnp.where(warming_up, 0, config.updates_per_step)
        learner, update_metrics = learn(state.learner, buffer, sample_key, updates, hyper)

        ended = terminated | truncated
        returns = state.returns + reward

        def sum_over_ended(x: jax.Array) -> jax.Array:
            return jnp.where(ended.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(axis=0)

        metrics = {
            "decision": {
                "reward": reward.mean(),
                "qos": info["qos"].mean(),
                "penalty": info["penalty"].mean(),
                "drop_rate": (action == env.num_actions - 1).mean(),
            },
            "update": update_metrics,
            "updates": updates,
            "episode": jax.tree.map(sum_over_ended, info["episode"]),
            "return": sum_over_ended(returns),
            "episodes": ended.sum(),
        }
        returns = jnp.where(ended, 0.0, returns)
        return TrainState(learner, buffer, env_state, observation, returns, key, state.steps + 1), metrics

    def train_chunk(state: TrainState, env_params: Any, hyper: Hyperparameters) -> tuple[TrainState, dict[str, Any]]:
        state, steps = jax.lax.scan(lambda s, _: step(s, env_params, hyper), state, length=config.steps_per_chunk)
        updates, episodes = steps["updates"].sum(), steps["episodes"].sum()
        update_metrics = jax.tree.map(lambda x: x.sum(axis=0) / updates, steps["update"])
        metrics = {
            **jax.tree.map(jnp.mean, steps["decision"]),
            **{name: getattr(update_metrics, name) for name in UpdateMetrics.__dataclass_fields__},
            "episodes": episodes.astype(jnp.float32),
            "return": steps["return"].sum() / episodes,
            "episode": jax.tree.map(lambda x: x.sum(axis=0) / episodes, steps["episode"]),
        }
        return state, metrics

    return Trainer(init=jax.jit(init), train_chunk=jax.jit(train_chunk, donate_argnums=0))


def policy_router(network: nn.Module, params: Any) -> Callable[..., jax.Array]:
    """A router that chooses the most probable action: router(key, observation, env_state, env_params) -> int32 [].

    `params` are the network's variables (`TrainState.learner.params`). The router is a pytree that contains them, so
    they are arguments of a program that it is passed to. It routes one environment and reads only the observation.
    """

    return jax.tree_util.Partial(_greedy(network), params)


@cache
def _greedy(network: nn.Module) -> Callable[..., jax.Array]:
    """Returns the same function at each call, so that policies of one network share a program."""

    def likeliest(params: Any, observation: Any) -> jax.Array:
        return jnp.argmax(sac.policy_logits(network, params, observation), axis=-1).astype(jnp.int32)

    best = custom_vmap(likeliest)

    @best.def_vmap
    def of_batch(axis_size: int, batched: Any, params: Any, observation: Any) -> tuple[jax.Array, bool]:
        """Applies the network to the batch as a whole, which is faster than `jax.vmap`."""
        params_batched, observation_batched = batched
        if any(jax.tree.leaves(params_batched)):
            axes = jax.tree.map(lambda flag: 0 if flag else None, (params_batched, observation_batched))
            return jax.vmap(likeliest, axes)(params, observation), True

        def with_axis(leaf: jax.Array, flag: bool) -> jax.Array:
            return leaf if flag else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        return best(params, jax.tree.map(with_axis, observation, observation_batched)), True

    def route(params: Any, key: jax.Array, observation: Any, env_state: Any, env_params: Any) -> jax.Array:
        return best(params, observation)

    return route
