"""Discrete soft actor-critic: one gradient update on a batch of transitions, as pure functions of a pytree.

The algorithm is that of Haarnoja et al. 2018 (arXiv 1812.05905) with the exact expectation over actions of
Christodoulou 2019 (arXiv 1910.07207). A network has `init(key, observation)` and three methods for
`apply(..., method=...)` on observations with any leading batch axes: `encode(observation) -> embedding` (any pytree),
`policy(embedding) -> logits [..., A]` and `critics(embedding) -> q [..., 2, A]`. The logit of a forbidden action is the
finite minimum of its dtype.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct


class Hyperparameters(struct.PyTreeNode):
    """Traced scalars, so a sweep may vary them with one compilation. Their values are in `configs/default.yaml`."""

    actor_learning_rate: Any
    critic_learning_rate: Any  # also for the shared encoder
    alpha_learning_rate: Any
    gamma: Any  # discount per second of simulated time, or per decision if `info` has no "elapsed"
    tau: Any  # fraction of the online network that an update mixes into the target network
    target_entropy_ratio: Any  # fraction of the maximum entropy; near 1, the temperature diverges with few actions
    initial_temperature: Any
    max_grad_norm: Any  # global norm to which the actor's and the critics' gradients are clipped, separately
    warmup_frames: Any  # decisions of all environments together before the first update
    reward_centering_rate: Any  # step size of the running mean reward; 0: rewards are not centred
    final_learning_rate: Any  # fraction of the learning rates that is left after their linear decay
    decay_updates: Any  # updates until the end of this decay
    critics_first: Any  # fraction of these updates during which only the critics learn


class Transition(struct.PyTreeNode):
    """One decision. Shapes are without batch axes; observations are any pytree of arrays."""

    observation: Any
    action: jax.Array  # int32 []
    reward: jax.Array  # float32 []
    terminated: jax.Array  # bool []; False at a truncation, where the next state still has a value
    elapsed: jax.Array  # float32 [], s to the next decision
    truncated: jax.Array  # bool []; if True, next_observation is of another episode and critics do not use it
    next_observation: Any


class LearnerState(struct.PyTreeNode):
    """Everything that an update reads and writes. All traced."""

    params: Any  # variables of the network: encoder, policy and critics
    target_params: Any  # same structure; the policy in it is not used
    optimizer: optax.OptState  # of params
    log_alpha: jax.Array  # float32 [], logarithm of the temperature
    alpha_optimizer: optax.OptState
    average_reward: jax.Array  # float32 [], running mean of the sampled rewards; 0 if centring is off
    updates: jax.Array  # int32 []


class UpdateMetrics(struct.PyTreeNode):
    """Means over the batch of one update, float32 []. Gradient norms are those before clipping."""

    critic_loss: jax.Array
    actor_loss: jax.Array
    alpha: jax.Array
    entropy: jax.Array  # nats
    mean_q: jax.Array  # of the smaller critic under the policy; centred if rewards are
    critic_grad_norm: jax.Array
    actor_grad_norm: jax.Array
    average_reward: jax.Array


def _actor_leaves(network: nn.Module, params: Any, observation: Any) -> Any:
    """For each leaf of `params`, whether it belongs to the policy head, which maps embeddings to logits. Static."""

    def policy_params(params: Any, observation: Any) -> Any:
        embedding = network.apply(params, observation, method="encode")
        return network.init(jax.random.key(0), embedding, method="policy")

    owned = {path for path, _ in jax.tree.leaves_with_path(jax.eval_shape(policy_params, params, observation))}
    return jax.tree.map_with_path(lambda path, _: path in owned, params)


def _optimizers(
    hyper: Hyperparameters, is_actor: Any
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The optimizers of the network and of the temperature. Each trace creates them, because their rates are traced.

    The actor's and the critics' parts of the network (see `_actor_leaves`) have separate rates and gradient norms.
    """
    clip = optax.clip_by_global_norm(hyper.max_grad_norm)
    rates = {True: hyper.actor_learning_rate, False: hyper.critic_learning_rate}
    parts: dict[Any, Any] = {actor: optax.chain(clip, optax.adam(rate)) for actor, rate in rates.items()}
    return optax.partition(parts, is_actor), optax.adam(hyper.alpha_learning_rate)


def init(key: jax.Array, network: nn.Module, observation: Any, hyper: Hyperparameters) -> LearnerState:
    """A fresh learner; `observation` is one unbatched observation, used for its shapes."""
    params = network.init(key, observation)
    optimizer, alpha = _optimizers(hyper, _actor_leaves(network, params, observation))
    log_alpha = jnp.log(jnp.asarray(hyper.initial_temperature, jnp.float32))
    return LearnerState(
        params=params,
        target_params=params,
        optimizer=optimizer.init(params),
        log_alpha=log_alpha,
        alpha_optimizer=alpha.init(log_alpha),
        average_reward=jnp.zeros((), jnp.float32),
        updates=jnp.zeros((), jnp.int32),
    )


def allowed_actions(logits: jax.Array) -> jax.Array:
    """bool [..., A]: whether masked logits [..., A] are above the finite minimum."""
    return logits > jnp.finfo(logits.dtype).min / 2


def policy_logits(network: nn.Module, params: Any, observation: Any) -> jax.Array:
    """float32 [..., A] for observations with any leading batch axes."""
    return network.apply(params, network.apply(params, observation, method="encode"), method="policy")  # type: ignore


def _log_policy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities and their logarithms, [..., A]. Both are 0 if masked, so their product cannot be 0 * inf."""
    allowed = allowed_actions(logits)
    log_probability = jnp.where(allowed, jax.nn.log_softmax(logits), 0.0)
    return jnp.where(allowed, jnp.exp(log_probability), 0.0), log_probability


def _centred(rewards: jax.Array, state: LearnerState, hyper: Hyperparameters) -> tuple[jax.Array, jax.Array]:
    """Rewards less their running mean, and that mean (Naik et al. 2024, arXiv 2405.09999, simple centring).

    Subtracting a constant from every reward shifts all values and changes no policy, as long as episodes never
    terminate. The critics then need not learn an offset of mean / (1 - gamma), about a hundred times the gaps between
    actions. The first updates use the plain mean of all batches so far, because a running mean that starts at 0 would
    shift all values for a long time.
    """
    rate = jnp.maximum(hyper.reward_centering_rate, 1.0 / (state.updates + 1))
    rate = jnp.where(hyper.reward_centering_rate > 0, rate, 0.0)
    average = state.average_reward + rate * (rewards.mean() - state.average_reward)
    return rewards - average, average


def _decayed(hyper: Hyperparameters, updates: jax.Array) -> Hyperparameters:
    """The hyperparameters with the learning rates at this number of updates. Lower rates at the end reduce noise.

    While only the critics learn, the actor's rate and the temperature's are 0.
    """
    progress = jnp.minimum(updates / jnp.maximum(hyper.decay_updates, 1), 1.0)
    share = 1 - (1 - hyper.final_learning_rate) * progress
    # An actor that followed critics that know nothing yet would forget the policy that it starts with.
    acting = jnp.where(progress < hyper.critics_first, 0.0, share)
    return dataclasses.replace(
        hyper,
        actor_learning_rate=acting * hyper.actor_learning_rate,
        critic_learning_rate=share * hyper.critic_learning_rate,
        alpha_learning_rate=acting * hyper.alpha_learning_rate,
    )


def update(
    network: nn.Module,
    state: LearnerState,
    batch: Transition,
    hyper: Hyperparameters,
) -> tuple[LearnerState, UpdateMetrics]:
    """One gradient step of critics (with the encoder), actor and temperature, then of the target network.

    Every leaf of `batch` is [B, ...]. The encoder is applied twice. With the trained weights, it encodes the
    observations for the critics' loss and, as a constant, for the actor's. With the target network's weights, it
    encodes the next observations for the target critics and the policy.
    """

    def apply(method: str, params: Any, inputs: Any) -> Any:
        return network.apply(params, inputs, method=method)

    alpha = jnp.exp(state.log_alpha)
    discount = hyper.gamma**batch.elapsed
    rewards, average_reward = _centred(batch.reward, state, hyper)

    next_embedding = apply("encode", state.target_params, batch.next_observation)
    next_probability, next_log_probability = _log_policy(apply("policy", state.params, next_embedding))
    next_q = apply("critics", state.target_params, next_embedding).min(axis=-2)
    next_value = jnp.sum(next_probability * (next_q - alpha * next_log_probability), axis=-1)
    target = rewards + discount * jnp.where(batch.terminated, 0.0, next_value)
    known = batch.terminated | ~batch.truncated

    def losses(params: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The sum of the critics' and the actor's losses. Neither has a gradient in the other's parameters."""
        embedding = apply("encode", params, batch.observation)
        q = apply("critics", params, embedding)
        taken = jnp.take_along_axis(q, batch.action[:, None, None], axis=-1)[..., 0]
        error = jnp.where(known[:, None], taken - target[:, None], 0.0)
        critic_loss = 0.5 * jnp.square(error).sum(axis=-1).mean()

        embedding, q = jax.lax.stop_gradient((embedding, q.min(axis=-2)))
        logits = apply("policy", params, embedding)
        probability, log_probability = _log_policy(logits)
        entropy = -jnp.sum(probability * log_probability, axis=-1).mean()
        mean_q = jnp.sum(probability * q, axis=-1).mean()
        # The maximum is over the allowed actions; otherwise, states with a single one would increase alpha.
        target_entropy = hyper.target_entropy_ratio * jnp.log(allowed_actions(logits).sum(axis=-1)).mean()
        actor_loss = -(mean_q + alpha * entropy)
        return critic_loss + actor_loss, (critic_loss, actor_loss, entropy, target_entropy, mean_q)

    grads, (critic_loss, actor_loss, entropy, target_entropy, mean_q) = jax.grad(losses, has_aux=True)(state.params)
    # d/d(log alpha) of log_alpha * (entropy - target): the temperature falls while the policy is too random.
    alpha_grad = entropy - target_entropy

    is_actor = _actor_leaves(network, state.params, batch.observation)
    optimizer, temperature = _optimizers(_decayed(hyper, state.updates), is_actor)
    updates, optimizer_state = optimizer.update(grads, state.optimizer)
    alpha_update, alpha_optimizer = temperature.update(alpha_grad, state.alpha_optimizer)
    log_alpha: Any = optax.apply_updates(state.log_alpha, alpha_update)
    params = optax.apply_updates(state.params, updates)

    def norm(actor: bool) -> jax.Array:
        return optax.tree.norm(jax.tree.map(lambda x, own: x if own == actor else None, grads, is_actor))

    metrics = UpdateMetrics(
        critic_loss=critic_loss,
        actor_loss=actor_loss,
        alpha=alpha,
        entropy=entropy,
        mean_q=mean_q,
        critic_grad_norm=norm(actor=False),
        actor_grad_norm=norm(actor=True),
        average_reward=average_reward,
    )
    following = LearnerState(
        params=params,
        target_params=optax.incremental_update(params, state.target_params, hyper.tau),
        optimizer=optimizer_state,
        log_alpha=log_alpha,
        alpha_optimizer=alpha_optimizer,
        average_reward=average_reward,
        updates=state.updates + 1,
    )
    # Under x64, some of these were computed in 64 bits.
    return jax.tree.map(lambda new, old: new.astype(old.dtype), following, state), metrics
