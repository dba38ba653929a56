"""Decisions per second of the environment with actions of the router's network: an untrained HAN and policy head, with
actions sampled from the policy as in training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import decisions
from benchmarks.decisions import Scan, Setting
from benchmarks.environment import rollout_by
from jaxroute.agent.router_network import RouterNetwork
from jaxroute.agent.sac import policy_logits
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import command


def rollout(setting: Setting, params: EnvParams) -> Scan:
    network = RouterNetwork()
    env = RoutingEnvironment(num_experts=setting.experts, slots=setting.slots)
    observation, _ = jax.jit(env.reset)(jax.random.key(0), params)
    weights = jax.jit(network.init)(jax.random.key(1), observation)

    def act(weights: Any, observation: Any, lengths: jax.Array, key: jax.Array) -> jax.Array:
        del lengths
        return jax.random.categorical(key, policy_logits(network, weights, observation))

    return rollout_by(act, weights, setting, params)


@command
def main(argv: Sequence[str] | None = None) -> int:
    return decisions.main("policy", __doc__, rollout, argv)


if __name__ == "__main__":
    sys.exit(main())
