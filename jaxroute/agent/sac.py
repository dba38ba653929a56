"""Discrete soft actor-critic: one gradient update on a batch of transitions, as pure functions of a pytree.

After Haarnoja et al. 2018 (arXiv 1812.05905) with the expectation over actions taken exactly, as Christodoulou 2019
(arXiv 1910.07207). A network offers `init(key, observation)` and, through `apply(..., method=...)`, on observations
with any leading batch axes: `encode(observation) -> embedding` (any pytree), `policy(embedding) -> logits [..., A]`
with the finite minimum of their dtype where an action is not allowed, and `critics(embedding) -> q [..., 2, A]`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct


class Hyperparameters(struct.PyTreeNode):
    """What may be swept: every field is a traced scalar, none changes a shape. Values: `configs/default.yaml`."""

    actor_learning_rate: Any
    critic_learning_rate: Any  # of the shared encoder too
    alpha_learning_rate: Any
    gamma: Any  # discount per second of simulated time; per decision, where the environment tells no time
    tau: Any  # share of the online network that an update mixes into the target network
    target_entropy_ratio: Any  # of the largest entropy; near 1 the temperature runs away with few actions
    initial_temperature: Any
    max_grad_norm: Any  # global norm, the actor's and the critics' gradients each
    warmup_frames: Any  # decisions over all environments that are random, before the first update
    reward_centering_rate: Any  # of the running mean reward per update; 0: rewards are not centred
    final_learning_rate: Any  # share of the three learning rates that is left after `decay_updates`, linearly
    decay_updates: Any


class Transition(struct.PyTreeNode):
    """One decision. Without batch axes here; observations are any pytree of arrays."""

    observation: Any
    action: jax.Array  # int32 []
    reward: jax.Array  # float32 []
    terminated: jax.Array  # bool []; a truncated episode is not terminated, its value goes on
    elapsed: jax.Array  # float32 [], s to the next decision
    truncated: jax.Array  # bool []; then next_observation is the first of another episode, and is not learned from
    next_observation: Any


class LearnerState(struct.PyTreeNode):
    """What an update reads and writes, all of it traced."""

    params: Any  # variables of the network: encoder, policy and critics
    target_params: Any  # same structure; its policy is not used
    optimizer: optax.OptState  # of params
    log_alpha: jax.Array  # float32 [], logarithm of the temperature
    alpha_optimizer: optax.OptState
    average_reward: jax.Array  # float32 [], running mean of the sampled rewards; 0 where centring is off
    updates: jax.Array  # int32 []


class UpdateMetrics(struct.PyTreeNode):
    """Means over the batch of one update, float32 []. Gradient norms are those before clipping."""

    critic_loss: jax.Array
    actor_loss: jax.Array
    alpha: jax.Array
    entropy: jax.Array  # nats
    mean_q: jax.Array  # of the smaller critic under the policy; centred where rewards are
    critic_grad_norm: jax.Array
    actor_grad_norm: jax.Array
    average_reward: jax.Array


def _actor_leaves(network: nn.Module, params: Any, observation: Any) -> Any:
    """For each leaf of `params` whether the policy owns it: it then reads it beyond the embedding. Static."""

    def policy_params(params: Any, observation: Any) -> Any:
        embedding = network.apply(params, observation, method="encode")
        return network.init(jax.random.key(0), embedding, method="policy")

    owned = {path for path, _ in jax.tree.leaves_with_path(jax.eval_shape(policy_params, params, observation))}
    return jax.tree.map_with_path(lambda path, _: path in owned, params)


def _optimizers(
    hyper: Hyperparameters, is_actor: Any
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of the network and of the temperature. Made anew in each trace, as their rates are traced; their state is kept.

    The actor's and the critics' part of the network (see `_actor_leaves`) each have a rate and a norm of their own.
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
    """bool [..., A] of masked logits [..., A]: where they are not at the finite minimum."""
    return logits > jnp.finfo(logits.dtype).min / 2


def policy_logits(network: nn.Module, params: Any, observation: Any) -> jax.Array:
    """float32 [..., A] for observations with any leading batch axes."""
    return network.apply(params, network.apply(params, observation, method="encode"), method="policy")  # type: ignore


def _log_policy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities and their logarithms, [..., A]; both 0 where masked, so that their product cannot be 0 * inf."""
    allowed = allowed_actions(logits)
    log_probability = jnp.where(allowed, jax.nn.log_softmax(logits), 0.0)
    return jnp.where(allowed, jnp.exp(log_probability), 0.0), log_probability


def _centred(rewards: jax.Array, state: LearnerState, hyper: Hyperparameters) -> tuple[jax.Array, jax.Array]:
    """Rewards less their running mean, and that mean (Naik et al. 2024, arXiv 2405.09999, simple centring).

    A constant taken off every reward changes all values alike and no policy, as long as episodes never terminate. It
    spares the critics an offset of mean / (1 - gamma), some hundred times the gaps between actions. The first
    updates take the plain mean of what they have seen: a mean that starts at 0 would drag all values along for long.
    """
    rate = jnp.maximum(hyper.reward_centering_rate, 1.0 / (state.updates + 1))
    rate = jnp.where(hyper.reward_centering_rate > 0, rate, 0.0)
    average = state.average_reward + rate * (rewards.mean() - state.average_reward)
    return rewards - average, average


def _decayed(hyper: Hyperparameters, updates: jax.Array) -> Hyperparameters:
    """With the learning rates after so many updates: the last ones average over what the first ones jump about."""
    progress = jnp.minimum(updates / jnp.maximum(hyper.decay_updates, 1), 1.0)
    share = 1 - (1 - hyper.final_learning_rate) * progress
    return dataclasses.replace(
        hyper,
        actor_learning_rate=share * hyper.actor_learning_rate,
        critic_learning_rate=share * hyper.critic_learning_rate,
        alpha_learning_rate=share * hyper.alpha_learning_rate,
    )


def update(
    network: nn.Module,
    state: LearnerState,
    batch: Transition,
    hyper: Hyperparameters,
) -> tuple[LearnerState, UpdateMetrics]:
    """One gradient step of critics (with the encoder), actor and temperature, then of the target network.

    Every leaf of `batch` is [B, ...]. The encoder is applied twice: once, as trained, to the observations, for the
    critics' loss and, as a constant, the actor's; and once, as the target network has it, to the next observations,
    for the target critics and for the policy.
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
        """The critics' loss and the actor's. The constants in them keep either from the other's parameters."""
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
        # The largest entropy is that of the allowed actions, or a state with one of them would drive alpha up.
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
    # Where JAX is set to 64 bits, some of it was computed in them.
    return jax.tree.map(lambda new, old: new.astype(old.dtype), following, state), metrics
