"""Streams of tokens of simulated servers, for tests of the ledger: what a front end would see of an episode."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.serving.estimate import environment_state
from jaxroute.serving.ledger import Ledger, Ticket
from tests.rollouts import CHEAP_COMPILE, Run, oracle


class Seen(NamedTuple):
    """The state of the simulator at a decision, and the ledger's estimate of it."""

    simulated: EnvState
    estimated: EnvState


def token_times(env: RoutingEnvironment, params: EnvParams, run: Run, actions: np.ndarray) -> list[list[float]]:
    """For each request of the run, the times at which the plain engines emit its tokens, s since the first arrival."""
    times: list[list[float]] = [[] for _ in actions]
    cluster, _ = oracle(env, params, run, range(0), actions[:0], actions[:0])
    for expert in cluster.experts:

        def compute(entries: Any, expert: Any = expert, compute: Any = expert.engine.compute) -> Any:
            result = compute(entries)
            for request in result[0]:
                times[int(request.id)].append(expert.clock)
            return result

        expert.engine.compute = compute
    for step, action in enumerate(actions):
        cluster.step(run.request(step), int(action), float(run.info["elapsed"][step]))
    cluster.drain()
    return times


estimate = jax.jit(environment_state, compiler_options=CHEAP_COMPILE)


def watch(
    env: RoutingEnvironment,
    params: EnvParams,
    run: Run,
    actions: np.ndarray,
    lengths_known: bool,
    delay: float = 0.0,
    delay_known: bool = True,
) -> tuple[list[Seen], Ledger]:
    """The run under `actions`, seen by a ledger from its streams alone.

    `lengths_known`: the client states each answer's length, as with max_tokens and ignore_eos. Tokens come `delay` s
    late, which the ledger knows or not. The ledger is returned after the last request has ended.
    """
    streams = token_times(env, params, run, actions)
    ledger = Ledger(env.num_experts, env.slots, np.asarray(params.engines.latency.base))
    ledger.delay[:] = delay * delay_known
    now, seen = 0.0, []
    tickets: dict[int, Ticket] = {}
    waiting: list[tuple[float, int, int]] = []  # time, request, number of its token

    def deliver(until: float) -> None:
        for time, request, number in sorted(event for event in waiting if event[0] <= until):
            ledger.progress(tickets[request], time, number)
            if number == len(streams[request]):
                ledger.end(tickets.pop(request), time, completed=True)
        waiting[:] = [event for event in waiting if event[0] > until]

    longest = np.asarray(params.engines.max_model_len)
    for step, action in enumerate(actions):
        deliver(now)
        ledger.arrive(now)
        before = jax.tree.map(lambda leaf, step=step: leaf[step], run.before)
        seen.append(Seen(before, jax.device_get(estimate(ledger.facts(now), before.request, params.engines))))
        if streams[step]:
            request = before.request
            prompt, output = int(request.prompt_tokens), int(request.output_tokens[action])
            most = output if lengths_known else 2**20
            tickets[step] = ledger.send(
                int(action), now, prompt, int(request.predicted_output_tokens[action]),
                float(request.predicted_score[action]), min(most, int(longest[action]) - prompt),
            )  # fmt: skip
            waiting += [(time + delay, step, number) for number, time in enumerate(streams[step], 1)]
        now += float(run.info["elapsed"][step])
    deliver(np.inf)
    return seen, ledger
