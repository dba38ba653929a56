"""Each router's rule, in many random states at once, against the rule in plain NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.environment.affinity import SentRecord
from jaxroute.errors import UserError
from jaxroute.routers import ROUTERS, make_router
from jaxroute.workload import Prefix
from tests.rollouts import CHEAP_COMPILE

SLOTS, STATES, KEYS, EXPERTS = 6, 60, 80, 3
NUMBERS = {
    "latency_based": {"buffer": 0.5},
    "routellm": {"threshold": 0.05, "strong": 2, "weak": 0},
    "score_minus_load": {"weight": 0.04},
    "route_balance": {"latency_weight": 0.5, "cost_weight": 0.2},
    "index_rule": {"load_weight": 0.04, "length_weight": 0.1, "threshold": 0.5, "cap": 5},
    "index_rule_prefix": {"load_weight": 0.04, "length_weight": 0.1, "threshold": 0.5, "cap": 5, "prefix_weight": 0.3},
    "dynamo_kv": {"overlap_weight": 3.0},
    "sglang_cache_aware": {"balance_abs_threshold": 2},
}
RECORD, EXPIRY = 12, 5.0
ADMITTED = {"shortest_queue+admission": 0.6, "feasible_best": 0.5, "index_rule+admission": 0.6}
NUMBERS |= {name: {**NUMBERS.get(name.partition("+")[0], {}), "admission": c} for name, c in ADMITTED.items()}
# Admission is the same code for every rule; tests/test_impact.py and tests/test_rollout.py have what simulates.
SIMULATING = ("block", "lookahead", "clairvoyant", "rollout", "rollout_clairvoyant")
# The universal router is compared with a plain computation in test_universal.py.
RULES = [name for name in ROUTERS if name not in (*SIMULATING, "universal") and ("+" not in name or name in ADMITTED)]


@pytest.fixture(scope="module")
def scenario():
    env, params = jaxroute.make("paper-3", slots=SLOTS, episode_length=60, metrics="off", penalty="off")
    env = dataclasses.replace(env, prefix_share="estimated")
    params = params.replace(prefix_expiry=jnp.asarray(EXPIRY))
    blocks, seats = jnp.asarray([40, 25, 60], jnp.int32), jnp.asarray([6, 4, 3], jnp.int32)
    return env, params.replace(engines=params.engines.replace(usable_blocks=blocks, max_num_seqs=seats))


@pytest.fixture(scope="module")
def states(scenario):
    """Random queues, some of them full, equal or empty, with random work in them; each leaf [STATES, ...]."""
    env, params = scenario
    rng = np.random.default_rng(0)
    reset = dataclasses.replace(env, prefix_share="off").reset
    one = jax.jit(reset, compiler_options=CHEAP_COMPILE)(jax.random.key(0), params)[1]
    state = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], STATES, axis=0), one)
    each, slots = (STATES, EXPERTS), (STATES, SLOTS, EXPERTS)
    requests = rng.integers(0, SLOTS + 1, each).astype(np.int32)
    requests[::5] = requests[::5, :1]  # ties
    requests[0], requests[1] = SLOTS, 0
    running = rng.integers(0, requests + 1).astype(np.int32)
    running[:15] = requests[:15]
    prompt = rng.integers(1, 200, slots).astype(np.int32)
    computed = np.where(np.arange(SLOTS)[:, None] < running[:, None], rng.integers(0, prompt + 40), 0).astype(np.int32)
    engines = state.engines.replace(
        num_requests=requests,
        num_running=running,
        prompt_tokens=prompt,
        computed=computed,
        generated=np.maximum(computed - prompt + 1, 0).astype(np.int32),
    )
    latency = np.where(rng.random(each) < 0.3, 0, rng.uniform(0.01, 0.03, each)).astype(np.float32)
    return state.replace(
        engines=engines,
        queued=state.queued.replace(predicted_tokens=rng.integers(1, 60, slots).astype(np.int32)),
        request=state.request.replace(
            prompt_tokens=rng.integers(20, 200, STATES).astype(np.int32),
            prefix=Prefix(pieces(rng, 4, STATES, 2), pieces(rng, 250, STATES, 2)),
            predicted_score=rng.uniform(0.5, 0.9, each).astype(np.float32),
            predicted_output_tokens=rng.integers(1, 200, each).astype(np.int32),
        ),
        recent_latency=latency,
        step=rng.integers(0, 60, STATES).astype(np.int32),
        sent=SentRecord(
            owner=tuple(pieces(rng, 4, STATES, RECORD) for _ in range(2)),
            end=tuple(pieces(rng, 250, STATES, RECORD) for _ in range(2)),
            expert=pieces(rng, EXPERTS, STATES, RECORD),
            sent=-rng.uniform(0, 3 * EXPIRY, (STATES, RECORD)).astype(np.float32),
            next=np.zeros(STATES, np.int32),
        ),
    )


def pieces(rng: np.random.Generator, below: int, *shape: int) -> np.ndarray:
    return rng.integers(0, below, shape).astype(np.int32)


def share(e: int, state, params) -> float:
    """Of the prompt, what expert `e` is expected to hold, entry by entry of the record."""
    prefix, sent, prompt = state.request.prefix, state.sent, int(state.request.prompt_tokens)
    longest = 0
    for entry in range(RECORD):
        if sent.expert[entry] == e and sent.sent[entry] > -params.prefix_expiry:
            for k in range(2):
                if prefix.owner[k] == sent.owner[k][entry]:
                    longest = max(longest, min(int(prefix.end[k]), prompt, int(sent.end[k][entry])))
    return longest / prompt


def kv_use(e: int, state, params) -> float:
    """Share of the KV blocks of expert `e` that its running requests hold."""
    engines, size = state.engines, int(params.engines.block_size[e])
    used = sum(-(-int(engines.computed[s, e]) // size) for s in range(engines.num_running[e]))
    return used / params.engines.usable_blocks[e]


def predicted(e: int, state, params) -> float:
    """`predicted_latency` of expert `e`, request by request."""
    engines, options, queued = state.engines, params.engines, state.queued
    model = jax.tree.map(lambda leaf: float(leaf[e]), options.latency)
    prompt, tokens = int(state.request.prompt_tokens), int(state.request.predicted_output_tokens[e])
    size, seats = int(options.block_size[e]), int(options.max_num_seqs[e])
    blocks, context, to_prefill, remaining = -(-prompt // size), prompt, prompt, 0
    count, running = int(engines.num_requests[e]) + 1, int(engines.num_running[e])
    for s in range(count - 1):
        generated = int(engines.generated[s, e])
        held = int(engines.computed[s, e]) if s < running else int(engines.prompt_tokens[s, e]) + generated
        context, blocks = context + held, blocks + -(-held // size)
        to_prefill += 0 if s < running else held
        remaining += max(int(queued.predicted_tokens[s, e]) - generated, 1) if s < running else 0
    decodes = min(count, seats)
    excess = max(0, count - seats, (blocks - int(options.usable_blocks[e])) / (blocks / count))
    above = [max(0, n - model.knee_tokens) * model.per_token_above_knee for n in (decodes, to_prefill)]
    iteration = model.base + model.per_decode * decodes + model.per_context_token * (context + decodes) + above[0]
    prefill = model.per_prefill_token * to_prefill + above[1]
    iterations = tokens + excess * remaining / max(running, 1) ** 2
    return (max(float(engines.clock[e]), 0) + prefill + iteration * iterations) / tokens


def possible(name: str, state, params) -> set[int]:
    """What the rule allows in one state (numpy leaves)."""
    engines, experts = state.engines, range(EXPERTS)
    total, running = engines.num_requests, engines.num_running
    waiting = total - running
    among = [e for e in experts if total[e] < SLOTS] or list(experts)
    if name in ADMITTED:
        latency = [predicted(e, state, params) for e in experts]
        among = [e for e in among if latency[e] < ADMITTED[name] * params.latency_limit]
        if not among:
            return {EXPERTS}
        name = {"feasible_best": "bert_router"}.get(name, name.partition("+")[0])
    score = state.request.predicted_score

    def least(cost) -> int:
        return min(among, key=lambda e: (cost[e], e))

    if name == "round_robin":
        return {next((int(state.step) + turn) % EXPERTS for turn in experts if (state.step + turn) % EXPERTS in among)}
    if name == "shortest_queue":
        return {least(total)}
    if name == "bert_router":
        return {least(-score)}
    if name == "random":
        return set(among)
    if name == "least_work":
        work = [0] * EXPERTS
        for e in experts:
            for s in range(total[e]):
                generated = engines.generated[s, e]
                left = max(state.queued.predicted_tokens[s, e], generated + 1) - generated
                work[e] += max(engines.prompt_tokens[s, e] - engines.computed[s, e], 0) + left
        return {least(work)}
    if name == "power_of_two":
        return {e for e in among if any(total[other] >= total[e] for other in among if other != e)} or set(among)
    if name == "latency_based":
        lowest = min(state.recent_latency[e] for e in among)
        return {e for e in among if state.recent_latency[e] <= np.float32(1.5) * lowest}
    if name == "vllm_data_parallel_v0_10":
        return {least(4 * waiting + running)}
    if name == "vllm_data_parallel":
        load = [total[e] + 6 * waiting[e] * max(0, kv_use(e, state, params) - 0.5) for e in experts]
        scan = [(int(state.step) + e) % EXPERTS for e in experts]
        return {min((e for e in scan if e in among), key=lambda e: load[e])}
    if name == "route_balance":
        tokens = state.request.predicted_output_tokens
        latency = [predicted(e, state, params) * tokens[e] for e in experts]
        slowest, dearest = max(latency[e] for e in among), max(tokens[e] for e in among)
        value = [score[e] + 0.5 * (1 - latency[e] / slowest) + 0.2 * (1 - tokens[e] / dearest) for e in experts]
        best = max(value[e] for e in among)
        return {e for e in among if value[e] > best - 1e-6}
    if name in ("llm_d", "llm_d_prefix"):
        most, fewest = max(waiting[e] for e in among), min(waiting[e] for e in among)
        sums = {}
        for e in among:
            queue = 1.0 if most == fewest else (most - waiting[e]) / (most - fewest)
            load = 0.5 if waiting[e] == 0 else 0.5 * (1 - min(waiting[e], 128) / 128)
            others = load if name == "llm_d" else 3 * share(e, state, params)
            sums[e] = 2 * queue + 2 * (1 - kv_use(e, state, params)) + others
        return {e for e in among if sums[e] > max(sums.values()) - 1e-6}
    if name == "routellm":
        order = (2, 0, 1) if score[2] - score[0] >= np.float32(0.05) else (0, 2, 1)
        return {next(e for e in order if e in among)}
    if name in ("index_rule", "index_rule_prefix"):
        tokens, weight = state.request.predicted_output_tokens, 0.3 if name == "index_rule_prefix" else 0
        value = {e: score[e] - 0.04 * total[e] - 0.1 * tokens[e] / 100 for e in among if total[e] < 5}
        value = {e: own + weight * share(e, state, params) for e, own in value.items()}
        best = max(value, key=lambda e: value[e], default=EXPERTS)
        return {best if best < EXPERTS and value[best] > 0.5 else EXPERTS}
    if name == "dynamo_kv":
        cost = {}
        for e in among:
            size, to_prefill = int(params.engines.block_size[e]), 0.0
            active = -(-int(state.request.prompt_tokens) // size)
            for s in range(total[e]):
                to_prefill += max(int(engines.prompt_tokens[s, e]) - int(engines.computed[s, e]), 0)
                active += -(-int(engines.prompt_tokens[s, e] + engines.generated[s, e]) // size)
            to_prefill += int(state.request.prompt_tokens) * (1 - share(e, state, params))
            cost[e] = 3 * to_prefill / size + active
        return {e for e in among if cost[e] < min(cost.values()) + 1e-4}
    if name == "sglang_cache_aware":
        loads, shares = [total[e] for e in among], {e: share(e, state, params) for e in among}
        unequal = max(loads) - min(loads) > 2 and max(loads) > 1.5 * min(loads)
        return {least(total if unequal or max(shares.values()) <= np.float32(0.3) else {e: -shares[e] for e in among})}
    assert name == "score_minus_load"
    return {least(np.float32(0.04) * total.astype(np.float32) - score)}


def test_every_rule_in_random_states_as_in_numpy(scenario, states):
    env, params = scenario
    traces = []

    def choices(state, params, key):
        traces.append(1)
        return {name: make_router(name, env, **NUMBERS.get(name, {}))(key, None, state, params) for name in RULES}

    over_keys = jax.vmap(choices, (None, None, 0))
    program = jax.jit(jax.vmap(over_keys, (0, None, None)), compiler_options=CHEAP_COMPILE)
    keys = jax.random.split(jax.random.key(1), KEYS)
    actions = jax.device_get(program(states, params, keys))
    program(states, params.replace(latency_limit=params.latency_limit * 2), keys)
    assert len(traces) == 1
    plain = jax.device_get(params)
    for index in range(STATES):
        state = jax.tree.map(lambda leaf, index=index: leaf[index], states)
        for name in RULES:
            assert actions[name].dtype == np.int32
            assert set(actions[name][index].tolist()) == possible(name, state, plain), (name, index)


def test_random_choices_are_all_alike(scenario, states):
    """In a state in which two experts are possible, each is taken half of the time."""
    env, params = scenario
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), states)
    queues = jnp.asarray([2, SLOTS, 2], jnp.int32)
    state = state.replace(
        engines=state.engines.replace(num_requests=queues, num_running=queues, computed=state.engines.computed * 0),
        recent_latency=jnp.asarray([0.02, 0.01, 0.02]),
    )
    names = ("random", "power_of_two", "latency_based", "llm_d")
    routers = [make_router(name, env) for name in names]
    keys = jax.random.split(jax.random.key(0), 1000)
    taken = jax.jit(jax.vmap(lambda key: [router(key, None, state, params) for router in routers]))(keys)
    for name, actions in zip(names, taken, strict=True):
        counts = np.bincount(actions, minlength=EXPERTS)
        assert counts[1] == 0 and abs(counts[0] - 500) < 70, name


def test_dynamos_temperature_is_that_of_a_softmax_over_the_range_of_costs(scenario, states):
    env, params = scenario
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), states)  # idle experts
    one = state.sent.replace(expert=state.sent.expert * 0, sent=state.sent.sent * 0)
    one = one.replace(owner=(state.request.prefix.owner[0] + one.owner[0] * 0, one.owner[1]))
    state = state.replace(sent=one, request=state.request.replace(prompt_tokens=jnp.int32(100)))
    router = make_router("dynamo_kv", env, temperature=0.5)
    taken = jax.vmap(lambda key: router(key, None, state, params))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(taken, minlength=EXPERTS) / 2000
    weights = np.exp([2.0, 0.0, 0.0])  # expert 0 costs the least, by the whole range
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.04)


def test_unknown_names_have_the_nearest(scenario):
    with pytest.raises(UserError, match="unknown router 'round-robin'; the nearest are round_robin"):
        jaxroute.make_router("round-robin", scenario[0])


def test_every_router_has_a_label_and_says_its_rule():
    assert len({spec.label for spec in ROUTERS.values()}) == len(ROUTERS)
    assert all(spec.label and spec.rule.__doc__ for spec in ROUTERS.values())


def test_unknown_parameters_have_the_nearest(scenario):
    with pytest.raises(UserError, match="parameter of the router latency_based 'bufer'; the nearest are buffer"):
        jaxroute.make_router("latency_based", scenario[0], bufer=0.1)


def test_values_of_parameters_are_checked(scenario):
    env = scenario[0]
    for wrong in (EXPERTS, -1, 1.0, True, None, "0", jnp.int32(EXPERTS), np.array([0])):
        with pytest.raises(UserError, match="router routellm: strong must be the number of an expert, 0 to"):
            make_router("routellm", env, strong=wrong)
    for wrong in (float("nan"), -np.inf, "0.1", None, True, [0.1], jnp.float32(np.nan)):
        with pytest.raises(UserError, match="router latency_based: buffer must be a finite number"):
            make_router("latency_based", env, buffer=wrong)
    make_router("routellm", env, strong=np.int64(1), weak=jnp.int32(0), threshold=np.float32(0.1))


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_values(name):
    """Made twice, for environments made twice, they are equal, and one program serves both."""
    one, other = (make_router(name, jaxroute.make("paper-3")[0]) for _ in range(2))
    assert one is not other and one == other and hash(one) == hash(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    assert one != make_router(name, jaxroute.make("paper-3", slots=7)[0])
