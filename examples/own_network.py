"""Your own network in jaxroute's learner: sums over the requests of each queue instead of graph attention.

    python examples/own_network.py            # QoS 0.705, Round-Robin 0.594; 64 s of one core
    python examples/own_network.py --short    # a few seconds, learns nothing

The figures are for paper-3 at its 3 requests/s, after 200,000 decisions of training (half of the package's default), on
20 fresh episodes of 5,000 requests.

The soft actor-critic needs three methods of a network: `encode`, `policy` and `critics`. The base class `ActorCritic`
defines `policy` for a network that has an `actor`. This network adds up the requests of each queue, passes every expert
through the same perceptrons, and concatenates each expert with the mean of all. It therefore works with any number of
experts, like the package's own network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

import jaxroute


class Features(struct.PyTreeNode):
    """The inputs of the heads. An embedding may be any pytree that contains the action mask."""

    expert: jax.Array  # float32 [..., N, F]
    action_mask: jax.Array  # bool [..., N + 1]


class SetNetwork(jaxroute.ActorCritic):
    """Policy logits [..., N + 1] and twin Q values [..., 2, N + 1]."""

    width: int = 64

    def setup(self) -> None:
        self.actor = ActionValues(self.width)
        self.critic, self.other_critic = ActionValues(self.width), ActionValues(self.width)

    def encode(self, obs: jaxroute.GraphObservation) -> Features:
        arrived = jnp.broadcast_to(obs.arrived[..., None, :], (*obs.expert.shape[:-1], obs.arrived.shape[-1]))
        queues = [queue.sum(axis=-2) / queue.shape[-2] for queue in (obs.running, obs.waiting)]  # 0 if empty
        return Features(jnp.concatenate([obs.expert, *queues, arrived], axis=-1), obs.action_mask)

    def critics(self, embedding: Features) -> jax.Array:
        return jnp.concatenate([self.critic(embedding), self.other_critic(embedding)], axis=-2)


class ActionValues(nn.Module):
    """One value for each action, [..., 1, N + 1]."""

    width: int

    @nn.compact
    def __call__(self, features: Features) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(features.expert))
        mean = jnp.broadcast_to(x.mean(axis=-2, keepdims=True), x.shape)
        x = nn.relu(nn.Dense(self.width)(jnp.concatenate([x, mean], axis=-1)))
        values = jnp.append(nn.Dense(1)(x)[..., 0], nn.Dense(1)(x.mean(axis=-2)), axis=-1)
        return values[..., None, :]


SHORT = [
    "environment.slots=8",
    "environment.episode_length=50",
    "environment.penalty=off",
    "training.frames=64",
    "training.num_envs=4",
    "training.batch_size=8",
    "training.buffer_capacity=64",
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few updates on a small cluster")
    short = parser.parse_args(argv).short
    config = jaxroute.load_config(overrides=SHORT if short else ["training.frames=200000"])
    experiment = jaxroute.build_experiment(config)
    network = SetNetwork()
    trainer = jaxroute.make_trainer(experiment.env, network, experiment.sac)

    started = time.monotonic()
    state = trainer.init(jax.random.key(config.training.seed), experiment.params, experiment.hyperparameters)
    for _ in range(-(-config.training.frames // (experiment.sac.num_envs * experiment.sac.steps_per_chunk))):
        state, _ = trainer.train_chunk(state, experiment.params, experiment.hyperparameters)
    print(f"{config.training.frames} decisions in {time.monotonic() - started:.0f} s")

    routers = {
        "own network": jaxroute.policy_router(network, state.learner.params),
        "round_robin": jaxroute.make_router("round_robin", experiment.env),
    }
    env, params = experiment.env, experiment.params
    for name, values in jaxroute.evaluate_routers(env, params, routers, episodes=1 if short else 20, seed=1).items():
        print(f"{name:12} QoS {values['qos'].mean():.4f}  dropped {values['drop_rate'].mean():.1%}")


if __name__ == "__main__":
    main()
