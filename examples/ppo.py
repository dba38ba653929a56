"""Proximal policy optimization in one file, in the style of purejaxrl: the whole training is one `jax.jit`.

    python examples/ppo.py            # QoS 0.721, Round-Robin 0.594; 77 s of one core
    python examples/ppo.py --short    # a few seconds, learns nothing

The figures are for paper-3 at its 3 requests/s, after 983,040 decisions of training, on 20 fresh episodes of 5,000
requests.

The agent uses the `FiveValues` view, with one flat vector as observation. Three things differ from a common PPO:

- episodes end by truncation only, so the value after the last step is that of `info["final_observation"]`;
- the discount is per second of simulated time, and `credit_discount` divides a request's QoS by the discount to the
  power of the request's age, so that slow answers are worth as much as fast ones;
- the policy masks the actions that `action_mask` forbids. The mask is at the end of the flat observation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxroute


class Config(NamedTuple):
    """Options of a training, all static."""

    updates: int = 120
    num_envs: int = 64
    rollout: int = 128  # decisions of each environment between two updates
    epochs: int = 4
    minibatches: int = 8
    learning_rate: float = 1e-3  # falls linearly to 0
    gamma: float = 0.93  # per second of simulated time
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.003


SHORT = Config(updates=2, num_envs=4, rollout=8, epochs=1, minibatches=2)


class ActorCritic(nn.Module):
    """float32 [..., F] -> logits [..., actions], which are -1e9 for forbidden actions, and values [...]."""

    actions: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        allowed = observation[..., -self.actions :] > 0

        def head(outputs: int, scale: float) -> jax.Array:
            x = observation
            for _ in range(2):
                x = nn.tanh(nn.Dense(64, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
            return nn.Dense(outputs, kernel_init=nn.initializers.orthogonal(scale))(x)

        return jnp.where(allowed, head(self.actions, 0.01), -1e9), head(1, 1.0)[..., 0]


class Transition(NamedTuple):
    """Each field [rollout, num_envs, ...]."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    value: jax.Array
    next_value: jax.Array  # of the true next observation
    reward: jax.Array
    discount: jax.Array  # to the next decision; 0 if terminated
    done: jax.Array


@partial(jax.jit, static_argnums=(0, 1))
def train(env: Any, config: Config, params: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    """The network's variables after training, and the mean QoS of a decision in each update, [updates].

    `env` has the view of five values; leaves of `params` are [num_envs, ...].
    """
    network = ActorCritic(env.num_actions)
    apply: Callable[..., tuple[jax.Array, jax.Array]] = network.apply  # pyright: ignore[reportAssignmentType]
    batch_size = config.num_envs * config.rollout // config.minibatches
    steps = config.updates * config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, eps=1e-5))

    def decide(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        variables, observation, state = carry
        key_action, key_step = jax.random.split(key)
        logits, value = apply(variables, observation)
        action = jax.random.categorical(key_action, logits)
        keys = jax.random.split(key_step, config.num_envs)
        following, state, reward, done, info = jax.vmap(env.step)(keys, state, action, params)
        transition = Transition(
            observation=observation,
            action=action,
            log_probability=log_probability_of(logits, action),
            value=value,
            next_value=apply(variables, info["final_observation"])[1],
            reward=reward,
            discount=info["discount"] * config.gamma ** info["elapsed"],
            done=done,
        )
        return (variables, following, state), (transition, info["qos"])

    def loss(variables: Any, batch: Any) -> jax.Array:
        transition, advantage, target = batch
        logits, value = apply(variables, transition.observation)
        ratio = jnp.exp(log_probability_of(logits, transition.action) - transition.log_probability)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        actor = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        critic = 0.5 * jnp.square(value - target).mean()
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(axis=-1).mean()
        return actor + 0.5 * critic - config.entropy * entropy

    def minibatch(carry: Any, batch: Any) -> tuple[Any, None]:
        variables, optimizer_state = carry
        updates, optimizer_state = optimizer.update(jax.grad(loss)(variables, batch), optimizer_state)
        return (optax.apply_updates(variables, updates), optimizer_state), None

    def update(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        variables, optimizer_state, observation, state = carry
        key_rollout, key_epochs = jax.random.split(key)
        keys = jax.random.split(key_rollout, config.rollout)
        (_, observation, state), (rollout, qos) = jax.lax.scan(decide, (variables, observation, state), keys)
        # Subtracting the mean changes no policy, because episodes never terminate, and simplifies the critic's task.
        reward = rollout.reward - rollout.reward.mean()
        error = reward + rollout.discount * rollout.next_value - rollout.value
        carried = jnp.where(rollout.done, 0, rollout.discount * config.gae_lambda)

        def advantages(advantage: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
            advantage = step[0] + step[1] * advantage
            return advantage, advantage

        advantage = jax.lax.scan(advantages, jnp.zeros(config.num_envs), (error, carried), reverse=True)[1]
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (rollout, advantage, advantage + rollout.value)
        )

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
            order = jax.random.permutation(key, config.num_envs * config.rollout).reshape(-1, batch_size)
            return jax.lax.scan(
                lambda carry, rows: minibatch(carry, jax.tree.map(lambda x: x[rows], flat)), carry, order
            )

        keys = jax.random.split(key_epochs, config.epochs)
        (variables, optimizer_state), _ = jax.lax.scan(epoch, (variables, optimizer_state), keys)
        return (variables, optimizer_state, observation, state), qos.mean()

    key_network, key_reset, key_updates = jax.random.split(key, 3)
    observation, state = jax.vmap(env.reset)(jax.random.split(key_reset, config.num_envs), params)
    variables = network.init(key_network, observation)
    carry = (variables, optimizer.init(variables), observation, state)
    (variables, *_), qos = jax.lax.scan(update, carry, jax.random.split(key_updates, config.updates))
    return variables, qos


def log_probability_of(logits: jax.Array, action: jax.Array) -> jax.Array:
    """[...] of logits [..., actions] and actions [...]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def route(variables: Any, key: jax.Array, observation: jax.Array, state: Any, params: Any) -> jax.Array:
    """The most probable action, as a router for the evaluation."""
    network = ActorCritic(actions=state.request.predicted_score.shape[0] + 1)
    return jnp.argmax(network.apply(variables, observation)[0]).astype(jnp.int32)


def copies(params: Any, count: int) -> Any:
    """The same parameters for `count` environments: leaves [count, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), params)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few updates on a small cluster")
    short = parser.parse_args(argv).short
    config = SHORT if short else Config()
    options: dict[str, Any] = {"slots": 8, "episode_length": 50} if short else {}
    env, params = jaxroute.make("paper-3", obs="flat", metrics="off", **options)
    params = params.replace(credit_discount=jnp.asarray(config.gamma, float))

    started = time.monotonic()
    environments = copies(params, config.num_envs)
    variables, qos = jax.block_until_ready(train(jaxroute.FiveValues(env), config, environments, jax.random.key(0)))
    seconds, decisions = time.monotonic() - started, config.updates * config.rollout * config.num_envs
    print(f"QoS while training: {', '.join(f'{value:.3f}' for value in qos[:: -(-config.updates // 10)])}")
    print(f"{decisions} decisions in {seconds:.0f} s, compilation included: {decisions / seconds:.0f}/s")

    routers = {"ppo": jax.tree_util.Partial(route, variables), "round_robin": jaxroute.make_router("round_robin", env)}
    for name, values in jaxroute.evaluate_routers(env, params, routers, episodes=2 if short else 20, seed=1).items():
        print(f"{name:12} QoS {values['qos'].mean():.4f}  dropped {values['drop_rate'].mean():.1%}")


if __name__ == "__main__":
    main()
