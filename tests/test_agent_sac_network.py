"""The trainer with the real network: requests go to the expert of the best predicted score."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxroute.agent.router_network import RouterNetwork
from jaxroute.agent.trainer import make_trainer, policy_router
from jaxroute.environment.observation import GraphObservation
from tests.learning import hyperparameters, sac_config

NUM_EXPERTS = 3


class ScoreEnvironment:
    """Random graphs; the reward is feature 4 of the chosen expert, 0.2 for a drop. Experts may be barred."""

    num_actions = NUM_EXPERTS + 1

    def reset(self, key: jax.Array, params: Any) -> tuple[GraphObservation, jax.Array]:
        keys = jax.random.split(key, 6)
        mask = jax.random.bernoulli(keys[0], 0.8, (self.num_actions,)).at[-1].set(True)
        observation = GraphObservation(
            arrived=jax.random.uniform(keys[1], (1,)),
            expert=jax.random.uniform(keys[2], (NUM_EXPERTS, 6)),
            running=jax.random.uniform(keys[3], (NUM_EXPERTS, 2, 6)),
            waiting=jnp.zeros((NUM_EXPERTS, 2, 6)),
            running_mask=jax.random.bernoulli(keys[4], 0.5, (NUM_EXPERTS, 2)),
            waiting_mask=jnp.zeros((NUM_EXPERTS, 2), bool),
            action_mask=mask,
        )
        return observation, self.rewards(observation)

    @staticmethod
    def rewards(observation: GraphObservation) -> jax.Array:
        return jnp.append(observation.expert[..., 4], 0.2)

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple[Any, ...]:
        observation, following = self.reset(key, params)
        info = {"final_observation": observation, "qos": state[action], "penalty": jnp.zeros(()), "episode": {}}
        return observation, following, state[action], jnp.zeros((), bool), jnp.zeros((), bool), info


@pytest.mark.slow
def test_learns_to_route_by_score() -> None:
    env, network = ScoreEnvironment(), RouterNetwork(hidden=16, heads=2, layers=1, mlp=(16,))
    hyper = hyperparameters(actor_learning_rate=1e-2, critic_learning_rate=1e-2, tau=0.05, gamma=0.0, warmup_frames=512)
    config = sac_config(num_envs=16, buffer_capacity=4096, steps_per_chunk=150)
    trainer = make_trainer(env, network, config)
    state, metrics = trainer.train_chunk(trainer.init(jax.random.key(0), None, hyper), None, hyper)
    del metrics["return"]  # no episode ends
    assert all(jnp.isfinite(x) for x in jax.tree.leaves(metrics))

    observation, rewards = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(1), 500), None)
    router = policy_router(network, state.learner.params)
    actions = jax.jit(jax.vmap(lambda x: router(jax.random.key(0), x, None, None)))(observation)
    possible = jnp.where(observation.action_mask, rewards, -1.0)
    chosen = jnp.take_along_axis(possible, actions[:, None], axis=1)
    assert chosen.min() >= 0  # nothing barred
    one_by_one = jax.lax.map(lambda x: router(jax.random.key(0), x, None, None), observation)
    assert (one_by_one == actions).all()  # above, as one batch
    assert chosen.mean() > 0.97 * possible.max(axis=1).mean()
