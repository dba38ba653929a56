"""Drives the routing environment for tests, and gives its parameters and requests to the plain Python reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.metrics import TIMINGS
from jaxroute.environment.state import EnvParams
from jaxroute.simulator.engine import EngineParams
from jaxroute.workload.arrivals import TraceArrivals
from jaxroute.workload.workload import Workload
from tests.reference.cluster import Arrival, Cluster, Worth
from tests.reference.impact import Latencies, Queue, Queued, penalty

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
"""How close two results in float64 are that differ only in the order of their sums."""

CHEAP_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that run once, which compile in a quarter of the time."""
if jax.__version_info__ < (0, 11):  # halves it once more; later versions do not know it
    CHEAP_COMPILE["xla_cpu_use_fusion_emitters"] = False


class Run(NamedTuple):
    """T steps of an environment, each field [T, ...] of numpy arrays."""

    before: Any  # EnvState
    observation: Any  # after the step, as are the following
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: dict[str, Any]

    def request(self, step: int) -> Arrival:
        """The request that was routed in this step."""
        request = self.before.request
        pieces = None
        if request.prefix is not None:
            pieces = list(zip(request.prefix.owner[step].tolist(), request.prefix.end[step].tolist(), strict=True))
        lengths = int(request.prompt_tokens[step]), request.output_tokens[step].tolist()
        return Arrival(*lengths, request.score[step].tolist(), pieces)


def rollout(env: RoutingEnvironment, params: EnvParams, key: jax.Array, actions: jax.Array) -> Run:
    """A traceable run from a reset, `actions` int32 [T]."""
    key_reset, key_steps = jax.random.split(key)
    _, state = env.reset(key_reset, params)

    def step(state, inputs):
        key, action = inputs
        observation, after, *others = env.step(key, state, action, params)
        return after, Run(state, observation, *others)

    return jax.lax.scan(step, state, (jax.random.split(key_steps, actions.shape[0]), actions))[1]


def batch_of_runs(
    env: RoutingEnvironment, scenarios: list[EnvParams], actions: list[np.ndarray], seed: int
) -> list[Run]:
    """One run for each scenario and list of actions, as one program."""
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenarios)
    keys = jax.random.split(jax.random.key(seed), len(scenarios))
    program = jax.jit(
        jax.vmap(lambda params, key, actions: rollout(env, params, key, actions)), compiler_options=CHEAP_COMPILE
    )
    runs = jax.device_get(program(params, keys, jnp.asarray(np.stack(actions), jnp.int32)))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], runs) for i in range(len(scenarios))]


def with_engines(params: EnvParams, **options: Any) -> EnvParams:
    """`params` with these engine options, each a list [N]; `latency` is a list of N lists of 4 coefficients."""
    engines = params.engines
    latency = options.pop("latency", None)
    if latency is not None:
        names = ("base", "per_prefill_token", "per_decode", "per_context_token")
        columns = dict(zip(names, jnp.asarray(latency, float).T, strict=True))
        engines = engines.replace(latency=engines.latency.replace(**columns))
    typed = {name: jnp.asarray(value, getattr(engines, name).dtype) for name, value in options.items()}
    return params.replace(engines=engines.replace(**typed))


ENGINE_NAMES = {"vllm_v1": "V1", "vllm_v0": "V0", "orca": "orca"}
"""The reference's name of each discipline."""


def configs_of(engines: EngineParams) -> list[dict[str, Any]]:
    """The engines [N] as configurations of the reference engine."""
    engines = jax.device_get(engines)
    is_v0 = engines.discipline == "vllm_v0"

    def own_options(i: int) -> dict[str, Any]:
        if not is_v0:
            names = ("enable_prefix_caching", "async_scheduling", "threshold_when_alone", "unhashed_first")
            own = {name: getattr(engines, name) for name in names}
            return own if own["enable_prefix_caching"] or own["async_scheduling"] else {}
        watermark = (engines.watermark_blocks[i] + 0.5) / engines.usable_blocks[i]
        return {"watermark": float(watermark), "async_output_proc": bool(engines.async_output_proc[i])}

    latency = engines.latency
    coefficients = [
        latency.base,
        latency.per_prefill_token,
        latency.per_decode,
        latency.per_context_token,
        latency.knee_tokens,
        latency.per_token_above_knee,
    ]
    return [
        {
            "max_num_seqs": int(engines.max_num_seqs[i]),
            "max_num_batched_tokens": int(engines.max_num_batched_tokens[i]),
            "enable_chunked_prefill": bool(engines.enable_chunked_prefill[i]),
            "block_size": int(engines.block_size[i]),
            "num_gpu_blocks": int(engines.usable_blocks[i]) + (not is_v0),
            "max_model_len": int(engines.max_model_len[i]),
            "reserve_full_isl": bool(engines.reserve_full_isl[i]),
            "long_prefill_token_threshold": int(engines.long_prefill_token_threshold[i]),
            "latency": [float(coefficient[i]) for coefficient in coefficients],
            **own_options(i),
        }
        for i in range(len(engines.usable_blocks))
    ]


def worth_of(params: EnvParams) -> Worth:
    """What answers are worth, for the reference cluster."""
    limits = [None if limit is None else float(limit) for limit in (params.ttft_limit, params.tpot_limit)]
    price = None if params.token_price is None else np.asarray(params.token_price).tolist()
    patience = math.inf if params.patience is None else float(params.patience)
    return Worth(float(params.latency_limit), *limits, price, patience)


def oracle(
    env: RoutingEnvironment, params: EnvParams, run: Run, steps: range, actions: np.ndarray, gaps: np.ndarray
) -> tuple[Cluster, list[float]]:
    """The reference cluster after one episode's `steps`, not drained, and the QoS of each. gaps[i] follows steps[i]."""
    engine = ENGINE_NAMES[params.engines.discipline]
    cluster = Cluster(configs_of(params.engines), env.slots, worth_of(params), engine)
    qos = [
        cluster.step(run.request(step), int(actions[step]), float(gap)) for step, gap in zip(steps, gaps, strict=True)
    ]
    return cluster, qos


class Judged(NamedTuple):
    """An episode of recorded arrivals, and what the reference cluster makes of it."""

    run: Run
    cluster: Cluster  # drained
    qos: list[float]  # of each step, by the cluster, as is the next
    drained: float
    totals: Any  # of the environment, at the end


def judged(env: RoutingEnvironment, params: EnvParams, times: np.ndarray, actions: np.ndarray) -> Judged:
    """An episode in float64 with arrivals at `times`, one more than there are `actions`."""
    with jax.enable_x64(True):
        params = params.replace(workload=Workload.create(TraceArrivals.create(times), params.workload.requests))
        run = batch_of_runs(env, [params], [actions], seed=5)[0]
    cluster, qos = oracle(env, params, run, range(len(actions)), actions, np.diff(times))
    totals = jax.tree.map(lambda leaf: leaf[len(actions) - 1], run.info["episode"])
    drained = cluster.drain()
    return Judged(run, cluster, qos, drained, totals)


def same_qos_and_timings(case: Any) -> None:
    """Compares the QoS of every step and the timings of every request of a `Judged` case, or one with its fields."""
    np.testing.assert_allclose(case.run.info["qos"], case.qos, **CLOSE)
    np.testing.assert_allclose(case.totals.drained_qos, case.drained, **CLOSE)
    for row, timing in zip(case.totals.timing_record, TIMINGS, strict=True):
        wanted = [getattr(fate, timing) if fate.status == "completed" else None for fate in case.cluster.fates]
        np.testing.assert_allclose(row, np.asarray(wanted, float), err_msg=timing, **CLOSE)


def same_counts(case: Any, *further: str) -> None:
    """Compares how many requests of each expert completed and were rejected, or had one of `further` fates."""
    for status in ("completed", "rejected_full", "rejected_infeasible", *further):
        counts = [case.cluster.count(status, expert) for expert in range(len(case.cluster.experts))]
        np.testing.assert_array_equal(getattr(case.totals, status), counts, err_msg=status)


def queue_of(params: EnvParams, run: Run, step: int, expert: int) -> Queue:
    """This expert's queue at the decision of this step, for the plain Python estimators."""
    before = run.before
    engines, queued, request = before.engines, before.queued, before.request
    config = configs_of(params.engines)[expert]
    here = (step, expert)
    requests = [
        Queued(
            running=slot < engines.num_running[here],
            prompt=int(engines.prompt_tokens[step, slot, expert]),
            generated=int(engines.generated[step, slot, expert]),
            computed=int(engines.computed[step, slot, expert]),
            true_tokens=int(engines.target_tokens[step, slot, expert]),
            age=-float(queued.arrival[step, slot, expert]),
            score=float(queued.score[step, slot, expert]),
            predicted_score=float(queued.predicted_score[step, slot, expert]),
            predicted_tokens=int(queued.predicted_tokens[step, slot, expert]),
        )
        for slot in range(engines.num_requests[here])
        if engines.finish_time[step, slot, expert] == np.inf  # else it only holds its seat for an iteration more
    ]
    return Queue(
        config=config,
        engine=ENGINE_NAMES[params.engines.discipline],
        clock=float(engines.clock[here]),
        requests=requests,
        prompt=int(request.prompt_tokens[step]),
        true_tokens=int(request.output_tokens[here]),
        predicted_tokens=int(request.predicted_output_tokens[here]),
    )


def wanted_penalties(
    params: EnvParams, run: Run, cluster: Cluster, limit: float, estimator: Callable[[Queue, int], Latencies]
) -> np.ndarray:
    """float [T]: the penalty by `estimator(queue, expert)`; 0 in steps whose request joins none of the oracle's
    experts.
    """
    return np.asarray(
        [
            penalty(estimator(queue_of(params, run, step, fate.expert), fate.expert), limit) if fate.served else 0.0
            for step, fate in enumerate(cluster.fates)
        ]
    )
