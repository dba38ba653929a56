"""Your own reward in a wrapper: the operator pays for every request that is sent to an expert.

    python examples/own_reward.py            # QoS less cost 0.625, Round-Robin 0.481; 133 s of one core
    python examples/own_reward.py --short    # a few seconds, learns nothing

The figures are for paper-3 at its 3 requests/s, on 16 fresh episodes of 2,500 requests. PPO on the usual reward has
0.584: its answers are better (QoS 0.721 instead of 0.695), but cost twice as much.

`Priced` subtracts the price of the chosen expert from the reward. The PPO of `ppo.py` is trained once on the usual
reward and once on that of `Priced`. Both policies and Round-Robin are compared by QoS less cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ppo import SHORT, Config, copies, route, train

import jaxroute

PRICES = (0.25, 0.05, 0.05)  # of a request to each expert, in units of QoS; dropping is free


@dataclass(frozen=True)
class Priced(jaxroute.Wrapper):
    """Subtracts the price of the chosen expert from the reward. A frozen dataclass can be pickled and hashed, so it may
    be a static argument."""

    prices: tuple[float, ...] = PRICES

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return observation, state, reward - jnp.asarray((*self.prices, 0.0))[action], terminated, truncated, info


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few updates on a small cluster")
    short = parser.parse_args(argv).short
    config = SHORT if short else Config()
    options: dict[str, Any] = {"slots": 8, "episode_length": 50} if short else {"episode_length": 2500}
    env, params = jaxroute.make("paper-3", obs="flat", metrics="off", **options)
    params = params.replace(credit_discount=jnp.asarray(config.gamma, float))

    routers: dict[str, Any] = {}
    for name, variant in {"own reward": Priced(env), "usual reward": env}.items():
        variables, _ = train(jaxroute.FiveValues(variant), config, copies(params, config.num_envs), jax.random.key(0))
        routers[name] = jax.tree_util.Partial(route, variables)
    routers["round_robin"] = jaxroute.make_router("round_robin", env)
    for name, values in jaxroute.evaluate_routers(env, params, routers, episodes=2 if short else 16, seed=1).items():
        qos, cost = values["qos"].mean(), (values["expert_share"] @ np.asarray(PRICES)).mean()
        print(f"{name:12} QoS - cost {qos - cost:.4f}  QoS {qos:.4f}  cost {cost:.4f}")


if __name__ == "__main__":
    main()
