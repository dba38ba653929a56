"""The other forms of QoS, in float64, against the plain Python cluster: limits on TTFT and TPOT, prices, and clients
that give up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.metrics import summarize
from jaxroute.environment.qos import QosRule
from jaxroute.environment.registry import SCENARIOS, make, make_params
from jaxroute.errors import UserError
from tests.rollouts import CLOSE, judged, same_counts, same_qos_and_timings, with_engines

EPISODE, SLOTS = 150, 16
FORMS = {
    "V1": {"ttft_limit": 0.4, "tpot_limit": 0.03, "token_price": [0.4, 0.2, 0.1], "patience": 3.0},
    "vllm-0.33": {"patience": 2.5},
}
"""Options of `EnvParams`, for vLLM with prefix caching and asynchronous scheduling off and on."""


@pytest.fixture(scope="module", params=FORMS)
def case(request):
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(1 / 9, EPISODE + 1))
    actions = rng.choice(4, EPISODE, p=[0.25, 0.35, 0.35, 0.05])
    with jax.enable_x64(True):
        env = RoutingEnvironment(3, slots=SLOTS, episode_length=EPISODE, metrics="exact", penalty="off")
        engine = None if request.param == "V1" else request.param
        params = make_params(SCENARIOS["paper-3"], latency_limit=0.08, engine=engine)
        params = with_engines(params, usable_blocks=[24, 30, 60], max_num_seqs=[64, 64, 5])
        numbers = {name: jnp.asarray(value, float) for name, value in FORMS[request.param].items()}
        params = params.replace(**numbers)
    return judged(env, params, times, actions)


def test_qos_of_every_step_and_timings_of_every_request(case):
    assert sum(expert.preemptions for expert in case.cluster.experts) > 8
    assert case.cluster.count("abandoned") > 20 and case.cluster.count("completed") > 30
    same_qos_and_timings(case)


def test_totals(case):
    totals, cluster = case.totals, case.cluster
    same_counts(case, "abandoned")
    late = [fate for fate in cluster.fates if fate.status == "completed" and fate.violated]
    assert totals.violations.sum() == len(late)
    np.testing.assert_allclose(totals.busy, [expert.busy for expert in cluster.experts], **CLOSE)
    metrics = summarize(totals, "exact")
    in_time = cluster.count("completed") - len(late)
    wanted = {
        "goodput": in_time / cluster.elapsed(),
        "cost": sum(fate.cost for fate in cluster.fates) / EPISODE,
        "qos": sum(fate.qos for fate in cluster.fates) / EPISODE,
        "abandon_rate": cluster.count("abandoned") / EPISODE,
    }
    np.testing.assert_allclose([metrics[name] for name in wanted], list(wanted.values()), rtol=1e-6)


def test_the_limit_per_token_of_a_length():
    rule = QosRule(jnp.asarray(9.0), ttft_limit=jnp.asarray(0.5), tpot_limit=jnp.asarray(0.02))
    np.testing.assert_allclose(rule.per_token(jnp.asarray([1, 11])), [0.5, (0.5 + 10 * 0.02) / 11], rtol=1e-6)
    ttft, latency = jnp.asarray([0.4, 0.4, 0.6, 0.4]), jnp.asarray([0.4, 0.59, 0.61, 0.61])
    assert rule.met(ttft, latency, jnp.asarray([1, 11, 11, 11])).tolist() == [True, True, False, False]


def test_only_v1_engines_cancel_requests():
    env, params = make("paper-3", discipline="orca", slots=4, episode_length=5, max_model_len=512)
    _, state = env.reset(jax.random.key(0), params)
    with pytest.raises(UserError, match="patience: only engines of the discipline vllm_v1 cancel requests, not orca"):
        env.step(jax.random.key(1), state, 0, params.replace(patience=jnp.asarray(1.0)))
