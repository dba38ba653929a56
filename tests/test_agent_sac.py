"""Discrete SAC and its trainer on two small environments with known optima."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxroute.agent import replay_buffer, sac
from jaxroute.agent.sac import Hyperparameters, LearnerState, Transition
from jaxroute.agent.trainer import TRAIN_STATE_AXES, TrainState, make_trainer, policy_router
from tests.learning import hyperparameters, sac_config

MASKED = jnp.finfo(jnp.float32).min


class Observation(struct.PyTreeNode):
    position: jax.Array  # float32 [S], one-hot
    action_mask: jax.Array  # bool [A]


class TabularNetwork(nn.Module):
    """The interface of RouterNetwork on a one-hot observation: linear, or with a hidden layer as shared encoder."""

    num_actions: int
    hidden: int = 0

    def setup(self) -> None:
        self.encoder = nn.Dense(self.hidden)
        self.policy_head = nn.Dense(self.num_actions, kernel_init=nn.initializers.zeros)
        self.critic_head = nn.DenseGeneral((2, self.num_actions), use_bias=False)

    def encode(self, observation: Observation) -> tuple[jax.Array, jax.Array]:
        features = observation.position
        return nn.relu(self.encoder(features)) if self.hidden else features, observation.action_mask

    def policy(self, embedding: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.where(embedding[1], self.policy_head(embedding[0]), MASKED)

    def critics(self, embedding: tuple[jax.Array, jax.Array]) -> jax.Array:
        return self.critic_head(embedding[0])

    def __call__(self, observation: Observation) -> tuple[jax.Array, jax.Array]:
        embedding = self.encode(observation)
        return self.policy(embedding), self.critics(embedding)


class TableState(struct.PyTreeNode):
    position: jax.Array  # int32 []
    time: jax.Array  # int32 []
    score: jax.Array  # float32 [], rewards of the episode so far


class TableParams(struct.PyTreeNode):
    rewards: jax.Array  # float32 [S, A]
    following: jax.Array  # int32 [S, A], the next position; negative: one drawn at random
    terminal: jax.Array  # bool [S, A]
    mask: jax.Array  # bool [S, A]


class TableEnvironment:
    """Positions and rewards from tables, the interface of the routing environment. Episodes begin at position 0."""

    def __init__(self, num_positions: int, num_actions: int, episode_length: int) -> None:
        self.num_positions, self.num_actions, self.episode_length = num_positions, num_actions, episode_length

    def observe(self, state: TableState, params: TableParams) -> Observation:
        return Observation(
            jax.nn.one_hot(state.position, self.num_positions, dtype=jnp.float32), params.mask[state.position]
        )

    def reset(self, key: jax.Array, params: TableParams) -> tuple[Observation, TableState]:
        state = TableState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(()))
        return self.observe(state, params), state

    def step(self, key: jax.Array, state: TableState, action: jax.Array, params: TableParams) -> tuple[Any, ...]:
        reward = params.rewards[state.position, action]
        terminated = params.terminal[state.position, action]
        truncated = state.time + 1 >= self.episode_length
        following = params.following[state.position, action]
        drawn = jax.random.randint(key, (), 0, self.num_positions)
        final = TableState(
            jnp.where(following < 0, drawn, following).astype(jnp.int32), state.time + 1, state.score + reward
        )
        first, start = self.reset(key, params)
        ended = terminated | truncated
        state, observation = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), (start, first), (final, self.observe(final, params))
        )
        info = {
            "final_observation": self.observe(final, params),
            "qos": reward,
            "penalty": jnp.zeros(()),
            # Only valid where the episode ended, as in the routing environment.
            "episode": {"score": jnp.where(ended, final.score, jnp.nan)},
            "taken": action,
        }
        return observation, state, reward, terminated, truncated, info


def contextual(seed: int = 0) -> TableParams:
    """Six contexts drawn at random, four actions of which the best but one is forbidden in half of the contexts."""
    rewards = np.random.default_rng(seed).permuted(np.tile([0.0, 0.3, 0.6, 1.0], (6, 1)), axis=1)
    mask = np.ones((6, 4), bool)
    mask[::2] = rewards[::2] < 1.0
    return TableParams(
        rewards=jnp.asarray(np.where(mask, rewards, 100.0), jnp.float32),  # taking a forbidden one would show
        following=jnp.full((6, 4), -1),
        terminal=jnp.zeros((6, 4), bool),
        mask=jnp.asarray(mask),
    )


def chain(terminal: bool) -> TableParams:
    """Two positions; action 0 stays, 1 moves to the other. With `terminal`, moving on from position 1 terminates."""
    return TableParams(
        rewards=jnp.array([[0.1, 0.4], [1.0, -0.5]]),
        following=jnp.array([[0, 1], [1, 0]]),
        terminal=jnp.array([[False, False], [False, terminal]]),
        mask=jnp.ones((2, 2), bool),
    )


CONTEXTUAL = TableEnvironment(6, 4, episode_length=40)
CONTEXTUAL_CONFIG = sac_config()
CONTEXTUAL_HYPER = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.result_type(x)),  # arrays, as a sweep's are: both share one compiled program
    hyperparameters(actor_learning_rate=1e-2, critic_learning_rate=1e-2, gamma=0.5, tau=0.05, warmup_frames=160),
)
CONTEXTUAL_NETWORK = TabularNetwork(4, hidden=16)
CONTEXTUAL_TRAINER = make_trainer(CONTEXTUAL, CONTEXTUAL_NETWORK, CONTEXTUAL_CONFIG)


def q_values(network: nn.Module, params: Any, num_positions: int, num_actions: int) -> np.ndarray:
    """The critics' [2, S, A] at every position, nothing masked."""
    everywhere = Observation(jnp.eye(num_positions), jnp.ones((num_positions, num_actions), bool))
    q = jax.vmap(lambda x: network.apply(params, x)[1], out_axes=1)(everywhere)  # type: ignore[index]
    return np.asarray(q)


def test_learns_a_contextual_task_under_masks_without_retracing() -> None:
    params = contextual()
    state = CONTEXTUAL_TRAINER.init(jax.random.key(0), params, CONTEXTUAL_HYPER)
    history = []
    traces = []
    for _ in range(40):
        state, metrics = CONTEXTUAL_TRAINER.train_chunk(state, params, CONTEXTUAL_HYPER)
        history.append(metrics)
        traces.append(CONTEXTUAL_TRAINER.train_chunk._cache_size())  # type: ignore[attr-defined]
    assert traces[0] == traces[-1]

    router = policy_router(CONTEXTUAL_NETWORK, state.learner.params)
    observation = Observation(jnp.eye(6), params.mask)
    best = jnp.where(params.mask, params.rewards, -1.0).argmax(axis=1)
    actions = jax.vmap(lambda x: router(jax.random.key(0), x, None, params))(observation)
    np.testing.assert_array_equal(actions, best)

    observation, taken, _ = replay_buffer.sample(state.buffer, jax.random.key(1), 5000)
    assert jnp.take_along_axis(observation.action_mask, taken.action[..., None], axis=-1).all()
    assert taken.reward.max() <= 1.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.learner)))

    # 160 frames of warm-up are 20 steps of 8 environments.
    assert history[0]["reward"] < 0.6 < 0.75 < history[-1]["reward"]
    assert int(state.learner.updates) == 40 * 30 - 20
    assert int(state.steps) == 1200
    # 40-step episodes in lockstep, 30-step chunks.
    assert [float(m["episodes"]) for m in history[:5]] == [0.0, 8.0, 8.0, 8.0, 0.0]
    assert 40 * 0.75 < history[-1]["episode"]["score"] < 40.0
    for metrics in history[1:]:
        np.testing.assert_allclose(metrics["return"], metrics["episode"]["score"], rtol=1e-5)
    for metrics in history[1:4]:
        assert all(x.shape == () and np.isfinite(x) for x in jax.tree.leaves(metrics))


def test_metrics_of_what_did_not_happen_are_nan() -> None:
    params, hyper = contextual(), CONTEXTUAL_HYPER.replace(warmup_frames=jnp.int32(10**9))
    before = CONTEXTUAL_TRAINER.init(jax.random.key(0), params, hyper)
    untouched = jax.device_get(before.learner)
    state, metrics = CONTEXTUAL_TRAINER.train_chunk(before, params, hyper)
    jax.tree.map(np.testing.assert_array_equal, untouched, jax.device_get(state.learner))
    assert np.isnan(metrics["critic_loss"]) and np.isnan(metrics["entropy"])
    assert metrics["episodes"] == 0 and np.isnan(metrics["episode"]["score"])
    assert np.isnan(metrics["return"])
    assert np.isfinite(metrics["reward"])


def test_trains_with_64_bit_numbers_too() -> None:
    with jax.enable_x64(True):
        params, hyper = contextual(), hyperparameters(warmup_frames=80)
        params = params.replace(rewards=params.rewards.astype(float))
        trainer = make_trainer(CONTEXTUAL, CONTEXTUAL_NETWORK, sac_config(steps_per_chunk=12))
        state, metrics = trainer.train_chunk(trainer.init(jax.random.key(0), params, hyper), params, hyper)
        assert state.learner.updates == 2 and np.isfinite(metrics["critic_loss"])
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.learner.params))


def uniform_policy_q(params: TableParams, gamma: float, alpha: float) -> np.ndarray:
    """The soft Q of the uniform policy, [S, A], from its linear equations, as if no episode were ever truncated."""
    rewards, following = np.asarray(params.rewards), np.asarray(params.following)
    positions, actions = rewards.shape
    transition = np.zeros((positions, actions, positions))
    np.put_along_axis(transition, following[..., None], ~np.asarray(params.terminal)[..., None], axis=-1)
    expected = np.repeat(np.eye(positions)[:, :, None], actions, axis=2).reshape(positions, -1) / actions
    matrix = np.eye(positions * actions) - gamma * transition.reshape(-1, positions) @ expected
    bonus = gamma * transition.sum(axis=-1) * alpha * np.log(actions)
    return np.linalg.solve(matrix, (rewards + bonus).reshape(-1)).reshape(positions, actions)


CHAIN = TableEnvironment(2, 2, episode_length=3)
CHAIN_NETWORK = TabularNetwork(2)
# Policy and temperature stay where they start (uniform, 0.2), so that the values are known.
CHAIN_HYPER = hyperparameters(
    actor_learning_rate=0.0,
    alpha_learning_rate=0.0,
    critic_learning_rate=1e-2,
    initial_temperature=0.2,
    gamma=0.8,
    tau=0.1,
    warmup_frames=400,
    reward_centering_rate=0.0,
)
CHAIN_TRAINER = make_trainer(CHAIN, CHAIN_NETWORK, sac_config(buffer_capacity=400, steps_per_chunk=2500))


def chain_q(params: TableParams, hyper: Hyperparameters) -> tuple[np.ndarray, TrainState]:
    state, _ = CHAIN_TRAINER.train_chunk(CHAIN_TRAINER.init(jax.random.key(1), params, hyper), params, hyper)
    return q_values(CHAIN_NETWORK, state.learner.params, 2, 2), state


@pytest.mark.parametrize("terminal", [False, True])
def test_values_go_on_through_truncation_and_end_at_termination(terminal: bool) -> None:
    """Episodes are cut after 3 steps; from the first observation of the next episode the values would differ."""
    params = chain(terminal)
    q, _ = chain_q(params, CHAIN_HYPER)
    expected = uniform_policy_q(params, gamma=0.8, alpha=0.2)
    np.testing.assert_allclose(q, np.stack([expected] * 2), atol=0.02)
    if terminal:
        assert abs(expected[1, 1] - -0.5) < 1e-9
    else:  # what each of the two mistakes would give is far from it
        assert np.abs(expected - uniform_policy_q(chain(True), 0.8, 0.2)).max() > 0.5


def test_centring_moves_all_values_alike() -> None:
    params = chain(False)
    plain, _ = chain_q(params, CHAIN_HYPER)
    centred, state = chain_q(params, CHAIN_HYPER.replace(reward_centering_rate=1e-3))
    average = float(state.learner.average_reward)
    assert abs(average - 0.25) < 0.1  # the mean of the four rewards, roughly
    np.testing.assert_allclose(plain - centred, average / (1 - 0.8), atol=0.1)
    np.testing.assert_allclose(np.diff(plain), np.diff(centred), atol=0.03)
    np.testing.assert_array_equal(plain.argmax(axis=-1), centred.argmax(axis=-1))


def random_batch(size: int = 32) -> Transition:
    """Transitions of the contextual task; in one of eight contexts only the last action is allowed."""
    keys = jax.random.split(jax.random.key(7), 4)
    mask = jax.random.bernoulli(keys[0], 0.6, (size, 4)).at[:, 3].set(True).at[::8, :3].set(False)
    observation = Observation(jax.nn.one_hot(jax.random.randint(keys[1], (size,), 0, 6), 6), mask)
    return Transition(
        observation=observation,
        action=jnp.full(size, 3),
        reward=jax.random.uniform(keys[2], (size,)),
        terminated=jnp.zeros(size, bool),
        elapsed=jax.random.uniform(keys[3], (size,), maxval=2.0),
        truncated=jnp.zeros(size, bool),
        next_observation=jax.tree.map(lambda x: x[::-1], observation),
    )


@jax.jit
def contextual_update(state: LearnerState, hyper: Hyperparameters) -> tuple[LearnerState, sac.UpdateMetrics]:
    return sac.update(CONTEXTUAL_NETWORK, state, random_batch(), hyper)


def fresh_learner(hyper: Hyperparameters, bias: jax.Array | None = None) -> LearnerState:
    observation = jax.tree.map(lambda x: x[0], random_batch().observation)
    state = sac.init(jax.random.key(0), CONTEXTUAL_NETWORK, observation, hyper)
    if bias is None:
        return state
    head = {**state.params["params"]["policy_head"], "bias": bias}
    return state.replace(params={"params": {**state.params["params"], "policy_head": head}})


def test_temperature_falls_when_the_policy_is_too_random_and_rises_when_it_is_not() -> None:
    hyper = hyperparameters()
    uniform = fresh_learner(hyper)
    falling, metrics = contextual_update(uniform, hyper)
    assert falling.log_alpha < uniform.log_alpha
    allowed = random_batch().observation.action_mask.sum(axis=1)
    assert abs(metrics.entropy - np.log(allowed).mean()) < 1e-5
    peaked, metrics = contextual_update(fresh_learner(hyper, jnp.array([0.0, 0.0, 0.0, 20.0])), hyper)
    assert peaked.log_alpha > uniform.log_alpha and metrics.entropy < 0.01
    # At a ratio of 1 the uniform policy over what is allowed is exactly on target, whatever is masked.
    hyper = hyper.replace(target_entropy_ratio=1.0, alpha_learning_rate=1.0)
    state = fresh_learner(hyper)
    gradient = jnp.abs(contextual_update(state, hyper)[0].alpha_optimizer[0].mu)
    assert gradient < 1e-6


def test_masked_actions_give_no_nan_at_a_high_temperature() -> None:
    """finfo.min times a temperature above 1 is -inf, and 0 * -inf would be NaN."""
    hyper = hyperparameters(initial_temperature=50.0)
    state, metrics = contextual_update(fresh_learner(hyper, jnp.array([90.0, -90.0, 0.0, 0.0])), hyper)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get((state, metrics))))


def test_actor_trains_the_policy_and_critics_train_the_encoder() -> None:
    frozen_actor, frozen_critics = (
        contextual_update(fresh_learner(hyper), hyper)[0].params["params"]
        for hyper in (hyperparameters(actor_learning_rate=0.0), hyperparameters(critic_learning_rate=0.0))
    )
    start = fresh_learner(hyperparameters()).params["params"]

    def moved(params: Any) -> set[str]:
        differs = jax.tree.map(lambda a, b: bool((a != b).any()), params, start)
        return {name for name in start if any(jax.tree.leaves(differs[name]))}

    assert moved(frozen_actor) == {"encoder", "critic_head"}
    assert moved(frozen_critics) == {"policy_head"}


def test_losses_are_those_of_the_formulas() -> None:
    """Recomputed transition by transition in numpy; the two target critics differ from the online ones."""
    hyper = hyperparameters(gamma=0.9, initial_temperature=0.3, reward_centering_rate=0.0)
    state = fresh_learner(hyper, jnp.array([1.0, 0.0, -1.0, 0.5]))
    state = state.replace(target_params=jax.tree.map(lambda x: 2.0 * x, state.params))
    batch = random_batch()
    _, metrics = contextual_update(state, hyper)

    def policy(params: Any, observation: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities of the allowed actions, their logarithms, and q [2, A] of those."""
        logits, q = map(np.asarray, CONTEXTUAL_NETWORK.apply(params, observation))
        allowed = np.asarray(observation.action_mask)
        weights = np.exp(logits[allowed])
        return weights / weights.sum(), np.log(weights / weights.sum()), q[:, allowed]

    critic_losses, actor_losses = [], []
    for one in (jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.action))):
        probability, log_probability, _ = policy(state.params, one.next_observation)
        next_q = policy(state.target_params, one.next_observation)[2].min(axis=0)
        target = one.reward + 0.9**one.elapsed * (probability * (next_q - 0.3 * log_probability)).sum()
        probability, log_probability, q = policy(state.params, one.observation)
        critic_losses.append(0.5 * ((q[:, -1] - target) ** 2).sum())  # the batch takes the last action
        actor_losses.append((probability * (0.3 * log_probability - q.min(axis=0))).sum())
    np.testing.assert_allclose(metrics.critic_loss, np.mean(critic_losses), rtol=1e-4)
    np.testing.assert_allclose(metrics.actor_loss, np.mean(actor_losses), rtol=1e-4)


def test_learning_rates_fall_linearly_to_their_last_share() -> None:
    hyper = hyperparameters(final_learning_rate=0.1, decay_updates=10)
    start = fresh_learner(hyper)

    def distance(updates: int) -> float:
        moved, _ = contextual_update(start.replace(updates=jnp.int32(updates)), hyper)
        pairs = zip(jax.tree.leaves(moved.params), jax.tree.leaves(start.params), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    # Adam's first step is as long as the learning rate.
    np.testing.assert_allclose(
        [distance(0), distance(5), distance(10), distance(99)], [3e-4, 1.65e-4, 3e-5, 3e-5], rtol=0.02
    )


def test_gradient_clipping_and_polyak_average() -> None:
    hyper = hyperparameters(max_grad_norm=1e-12, tau=0.25)  # far below Adam's epsilon: nothing may move
    start = fresh_learner(hyper)
    state, metrics = contextual_update(start, hyper)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, start.params)
    assert metrics.critic_grad_norm > 1e-3
    hyper = hyper.replace(max_grad_norm=10.0)
    state, _ = contextual_update(start, hyper)
    jax.tree.map(
        lambda target, online, old: np.testing.assert_allclose(target, 0.25 * online + 0.75 * old, rtol=1e-5),
        *(state.target_params, state.params, start.params),
    )


def test_same_seed_same_numbers_and_vmap_equals_single_runs() -> None:
    params = contextual()
    environments = jax.tree.map(lambda x: jnp.stack([x, x]), params).replace(
        rewards=jnp.stack([params.rewards, 0.5 * params.rewards])
    )
    hypers = jax.tree.map(lambda x: jnp.stack([x, x]), CONTEXTUAL_HYPER).replace(
        critic_learning_rate=jnp.array([1e-2, 3e-3]), warmup_frames=CONTEXTUAL_HYPER.warmup_frames
    )
    hyper_axes = jax.tree.map(lambda _: 0, CONTEXTUAL_HYPER).replace(warmup_frames=None)
    keys = jax.random.split(jax.random.key(5), 2)
    axes = (TRAIN_STATE_AXES, 0, hyper_axes)
    states = jax.jit(jax.vmap(CONTEXTUAL_TRAINER.init, (0, *axes[1:]), TRAIN_STATE_AXES))(keys, environments, hypers)
    sweep = jax.jit(jax.vmap(CONTEXTUAL_TRAINER.train_chunk, axes, (TRAIN_STATE_AXES, 0)), donate_argnums=0)
    states, metrics = sweep(states, environments, hypers)
    assert states.steps.shape == () and states.buffer.rows_added.shape == ()

    def single(i: int) -> tuple[TrainState, dict[str, Any]]:
        pick = jax.tree.map(lambda x: x[i], (environments, hypers.replace(warmup_frames=jnp.zeros(2))))
        hyper = pick[1].replace(warmup_frames=CONTEXTUAL_HYPER.warmup_frames)
        return CONTEXTUAL_TRAINER.train_chunk(CONTEXTUAL_TRAINER.init(keys[i], pick[0], hyper), pick[0], hyper)

    first, second = single(0), single(1)
    alone, alone_metrics = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), metrics, alone_metrics)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *(states.learner.params, alone.learner.params),
    )
    np.testing.assert_array_equal(states.buffer.outcomes.action, alone.buffer.outcomes.action)
    again, _ = single(1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.learner), jax.device_get(second[0].learner))
