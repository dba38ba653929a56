"""Monte Carlo tree search with mctx: the environment is the model that Gumbel MuZero's search runs on.

    pip install 'jaxroute[mctx]'
    python examples/mctx_search.py            # QoS 0.676, its prior's rule 0.659, Round-Robin 0.596; a few minutes
    python examples/mctx_search.py --short    # one small cluster, a few seconds

The figures are for paper-3 at its 3 requests/s, on 8 fresh episodes of 500 requests.

A node of the tree is a copy of the cluster, and a simulation steps it. Nothing is learned: the prior prefers the choice
of a rule, and the value of a node is the QoS that its open requests will have if no other request arrives. Arrivals are
sampled when a node is made, so one tree is one future; the router averages the improved policies of several trees. As
in `planning.py`, the search sees predicted lengths and scores instead of the true ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mctx
from planning import believed

import jaxroute

PRIOR = 2.0  # logit of the rule's choice; those of the other actions are 0


def make_search(env: Any, trees: int, simulations: int, rule: Any) -> Any:
    """A router that searches `trees` trees for each decision."""
    model = dataclasses.replace(env, metrics="off", penalty="off")

    def evaluate(key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, jax.Array]:
        """Prior logits, float [N + 1], and value, float []."""
        choice = rule(key, None, state, params)
        return PRIOR * jax.nn.one_hot(choice, env.num_actions), model.drain(state, params)

    def expand(params: Any, key: jax.Array, action: jax.Array, state: Any) -> tuple[Any, Any]:
        """The child of each tree's node `state` by `action`, int32 [trees]."""

        def one(key: jax.Array, action: jax.Array, state: Any) -> tuple[Any, Any]:
            _, state, _, _, _, info = model.step(key, state, action, params)
            logits, value = evaluate(key, state, params)
            found = {"reward": info["qos"], "discount": jnp.ones_like(value), "prior_logits": logits, "value": value}
            return mctx.RecurrentFnOutput(**found), state

        return jax.vmap(one)(jax.random.split(key, trees), action, state)

    def router(key: jax.Array, observation: Any, state: Any, params: Any) -> jax.Array:
        start = believed(state, params).replace(totals=None)
        logits, value = evaluate(key, start, params)
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=start)
        root = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (trees, *leaf.shape)), root)
        mask = jnp.broadcast_to(~observation.action_mask, (trees, env.num_actions))
        searched = mctx.gumbel_muzero_policy(
            params, key, root, expand, num_simulations=simulations, invalid_actions=mask, gumbel_scale=0.0
        )
        return jnp.argmax(searched.action_weights.mean(axis=0)).astype(jnp.int32)

    return router


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one short episode on a small cluster")
    short = parser.parse_args(argv).short
    env, params = jaxroute.make("paper-3", **({"slots": 8, "episode_length": 10} if short else {"episode_length": 500}))
    rule = jaxroute.make_router("score_minus_load", env)
    routers = {
        "mctx search": make_search(env, trees=2, simulations=4, rule=rule)
        if short
        else make_search(env, trees=8, simulations=32, rule=rule),
        "score_minus_load": rule,
        "round_robin": jaxroute.make_router("round_robin", env),
    }
    for name, values in jaxroute.evaluate_routers(env, params, routers, episodes=1 if short else 8, seed=1).items():
        print(f"{name:16} QoS {values['qos'].mean():.4f}  dropped {values['drop_rate'].mean():.1%}")


if __name__ == "__main__":
    main()
