"""The comparison of actions that improves the policy that training starts with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.agent import improvement
from jaxroute.agent.improvement import Comparisons, compare_actions, improve
from jaxroute.agent.router_network import RouterNetwork, with_linear_policy
from jaxroute.agent.sac import policy_logits
from jaxroute.environment.observation import EXPERT_FEATURES

NETWORK = RouterNetwork(hidden=8, heads=2, layers=1, mlp=(8,))
COUNT, COPIES = 8, 256
SCORE = EXPERT_FEATURES.index("predicted_score")


@pytest.fixture(scope="module")
def busy():
    return jaxroute.make("overload-3", slots=16, episode_length=60, queue_nodes=2)


@pytest.fixture(scope="module")
def comparisons(busy):
    env, params = busy
    weights = jnp.zeros(len(EXPERT_FEATURES) + 1).at[SCORE].set(20.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(improvement, "_NOISIEST", np.inf)
        for name, value in (("_ENVIRONMENTS", 16), ("_COMPARED", COUNT), ("_ROUNDS", 4), ("_SHORTEST", 5)):
            patch.setattr(improvement, name, value)
        told = []
        found = compare_actions(env, params, None, weights, 1500, 7, told.append)
        assert told == sorted(told) and told[-1] == 1500
        again = compare_actions(env, params, None, weights, 1500, 7)
        patch.setattr(improvement, "_NOISIEST", 1e-6)
        told.clear()
        assert compare_actions(env, params, None, weights, 4000, 7, told.append) is None
        assert len(told) == 1 and told[0] < 2000
    jax.tree.map(np.testing.assert_array_equal, found, again)
    return found


def test_the_compared_actions_are_allowed_and_centred(comparisons):
    lead, allowed = comparisons.lead, comparisons.observation.action_mask
    assert len(lead) % (4 * COUNT) == 0 and lead.shape == allowed.shape
    assert (lead[~allowed] == 0).all()
    values = np.where(
        allowed, np.append(comparisons.observation.expert[..., SCORE] * 20, np.zeros((len(lead), 1)), 1), -1e9
    )
    best = np.argsort(-values, axis=1, kind="stable")[:, :2]
    found = np.take_along_axis(lead, best, axis=1)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-5)
    assert np.abs(found).max() > 0.1


def test_a_policy_learns_which_of_two_actions_leads(comparisons):
    """Leads that one feature decides: after the improvement, the policy follows them where the linear one did not."""
    expert = np.array(comparisons.observation.expert)
    rng = np.random.default_rng(0)
    repeated = jax.tree.map(lambda leaf: np.concatenate([leaf] * COPIES), comparisons.observation)
    rows = len(expert) * COPIES
    expert = rng.normal(size=(rows, *expert.shape[1:])).astype(np.float32)
    repeated = repeated.replace(expert=expert, action_mask=np.ones((rows, 4), bool))
    better = np.sign(expert[:, 0, 3] - expert[:, 2, 3])
    lead = np.stack([better, np.full(rows, -2), -better, np.full(rows, -2)], axis=1).astype(np.float32)
    weights = jnp.zeros(len(EXPERT_FEATURES) + 1).at[0].set(0.02)
    first = jax.tree.map(lambda leaf: leaf[0], repeated)
    variables = with_linear_policy(NETWORK.init(jax.random.key(0), first), weights)

    def share(variables):
        logits = policy_logits(NETWORK, variables, repeated)
        return np.mean(np.where(logits[:, 0] > logits[:, 2], 1, -1) == better)

    improved = improve(NETWORK, variables, Comparisons(repeated, lead), seed=0)
    assert share(variables) < 0.6 and share(improved) > 0.9
