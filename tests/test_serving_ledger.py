"""The ledger: its state is the simulator's, and nothing is left of what has ended."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxroute
from jaxroute.environment.state import EnvParams
from jaxroute.serving.ledger import Ledger, Ticket
from jaxroute.simulator.disciplines import used_blocks
from jaxroute.timelines.collect import DROPPED
from jaxroute.timelines.live import Record, live_episodes
from jaxroute.workload import PoissonArrivals
from tests.live_streams import Seen, estimate, token_times, watch
from tests.rollouts import CHEAP_COMPILE, batch_of_runs, rollout, with_engines

LENGTH = 150  # decisions
CASES: dict[str, tuple[float, dict[str, Any]]] = {  # requests/s, options of the engines
    "paper-3": (3.0, {}),
    "overload": (6.0, {}),
    "short of KV blocks": (6.0, {"usable_blocks": [40] * 3}),
    "short of seats": (6.0, {"max_num_seqs": [3] * 3}),
}


@functools.cache
def runs() -> tuple[Any, dict[str, tuple[EnvParams, Any, np.ndarray]]]:
    env, params = jaxroute.make("paper-3", episode_length=LENGTH + 1, metrics="off", penalty="off")
    scenarios, actions = [], []
    for seed, (rate, engines) in enumerate(CASES.values()):
        workload = dataclasses.replace(params.workload, arrivals=PoissonArrivals.create(rate))
        scenarios.append(with_engines(params.replace(workload=workload), **engines))
        actions.append(np.random.default_rng(seed).choice(4, LENGTH, p=[0.32, 0.32, 0.32, 0.04]).astype(np.int32))
    done = batch_of_runs(env, scenarios, actions, seed=0)
    return env, {name: found for name, *found in zip(CASES, scenarios, done, actions, strict=True)}


@functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP_COMPILE)
def observe(env: Any, state: Any, params: EnvParams) -> Any:
    return env.observe(state.replace(workload=None), params)


def equal_queues(seen: Seen) -> np.ndarray:
    """bool [N]: the estimated queue of the expert is the simulated one, request by request."""
    simulated, estimated = seen.simulated, seen.estimated
    position = np.arange(simulated.queued.index.shape[0])[:, None]
    there = position < simulated.engines.num_requests
    fields = ("prompt_tokens", "generated", "computed")
    same = [getattr(simulated.engines, name) == getattr(estimated.engines, name) for name in fields]
    same += [
        getattr(simulated.queued, name) == getattr(estimated.queued, name)
        for name in ("predicted_tokens", "predicted_score")
    ]
    same.append(abs(simulated.queued.arrival - estimated.queued.arrival) < 1e-4)
    return (
        (simulated.engines.num_requests == estimated.engines.num_requests)
        & (simulated.engines.num_running == estimated.engines.num_running)
        & (np.all(same, axis=0) | ~there).all(axis=0)
        & ((abs(simulated.engines.clock - estimated.engines.clock) < 1e-4) | ~there.any(axis=0))
    )


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_simulators_where_lengths_are_known(name):
    env, found = runs()
    params, run, actions = found[name]
    seen, ledger = watch(env, params, run, actions, lengths_known=True)
    assert all(equal_queues(one).all() for one in seen)
    assert ledger.open == 0
    for one in seen:
        assert abs(one.simulated.recent_gap - one.estimated.recent_gap) < 1e-4
        assert one.simulated.step == one.estimated.step
    if name == "short of KV blocks":
        assert max(one.simulated.engines.preemptions.max() for one in seen) > 0
    # The observation and thus the decision follow from the state.
    for one in seen[:: LENGTH // 5]:
        wanted, got = observe(env, one.simulated, params), observe(env, one.estimated, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), wanted, got)


@pytest.mark.parametrize("name", CASES)
def test_unknown_lengths_cost_the_ends_of_the_iteration_under_way(name):
    """The simulator counts an iteration under way as finished; a front end cannot know who will end in it."""
    env, found = runs()
    params, run, actions = found[name]
    seen, ledger = watch(env, params, run, actions, lengths_known=False)
    assert ledger.open == 0
    equal = np.array([equal_queues(one) for one in seen])
    ends = np.array([one.estimated.engines.num_requests > one.simulated.engines.num_requests for one in seen])
    assert (equal | ends).mean() > 0.99
    assert equal.mean() > 0.88


def test_a_delay_that_is_known_costs_little():
    env, found = runs()
    params, run, actions = found["paper-3"]
    shares = [
        np.mean([equal_queues(one).mean() for one in watch(env, params, run, actions, True, 0.006, known)[0]])
        for known in (True, False)
    ]
    assert shares[0] > 0.99 and shares[1] < 0.5


def test_recent_latency_is_the_environments():
    env, found = runs()
    params, run, actions = found["paper-3"]
    seen, _ = watch(env, params, run, actions, lengths_known=True)
    # A completion in the iteration under way is known one decision later.
    simulated = np.array([one.simulated.recent_latency for one in seen])
    estimated = np.array([one.estimated.recent_latency for one in seen])
    assert (np.abs(simulated - estimated) < 1e-5).mean() > 0.8


def test_a_record_of_these_streams_is_simulated_to_the_same_times():
    """`timelines.live`: the choices and times of a record, which here come from plain engines."""
    env, found = runs()
    params, run, actions = found["paper-3"]
    streams = token_times(env, params, run, actions)
    arrival = np.concatenate([[0.0], np.cumsum(run.info["elapsed"][:-1])])
    nothing = np.zeros(LENGTH)
    record = Record(
        router="any",
        experts=("e0", "e1", "e2"),
        engines=params.engines,
        slots=env.slots,
        latency_limit=0.03,
        left_out=0,
        expert=np.where(actions < 3, actions, -1),
        limit=nothing + 0.03,
        arrival=arrival,
        first_token=np.array([stream[0] if stream else np.nan for stream in streams]),
        finish=np.array([stream[-1] if stream else np.nan for stream in streams]),
        tokens=np.array([len(stream) for stream in streams]),
        prompt_tokens=run.before.request.prompt_tokens,
        score=nothing + 0.5,
        met=nothing > 0,
    )
    live, simulated = (episode.requests for episode in live_episodes(record))
    for field in ("first_token", "finish"):
        np.testing.assert_allclose(getattr(live, field), getattr(simulated, field), atol=2e-4)
    assert (live.fate[actions == 3] == DROPPED).all() and (simulated.fate[actions == 3] == DROPPED).all()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["send", "progress", "progress", "progress", "complete", "fail", "decide"]),
        st.integers(0, 2),  # expert
        st.integers(0, 30),  # which of the open requests; tokens
        st.floats(0, 0.2),  # s since the event before
    ),
    max_size=60,
)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(EVENTS)
def test_nothing_leaks_whatever_comes_in_whatever_order(events):
    env, params = small()
    ledger = Ledger(env.num_experts, env.slots, np.full(env.num_experts, 0.015))
    open_requests: list[Ticket] = []
    tokens: dict[Ticket, int] = {}
    now = 0.0
    request = jax.tree.map(np.asarray, params.workload.sample(jax.random.key(0), None)[2])
    for kind, expert, number, gap in events:
        now += gap
        if kind == "send" and ledger.count[expert] < env.slots:
            open_requests.append(ledger.send(expert, now, 1 + 9 * number, 1 + number, 0.5, 100))
            tokens[open_requests[-1]] = 0
        elif kind == "decide":
            ledger.arrive(now)
            check(ledger, jax.device_get(estimate(ledger.facts(now), request, params.engines)), params, open_requests)
        elif open_requests:
            ticket = open_requests[number % len(open_requests)]
            if kind == "progress":
                tokens[ticket] += number % 3  # a chunk may have no token, or several
                ledger.progress(ticket, now, tokens[ticket], prompt_tokens=number or None)
                assert ledger.generated(ticket) == tokens[ticket]
            else:
                ledger.end(ticket, now, completed=kind == "complete")
                open_requests.remove(ticket)
                assert not ledger.is_open(ticket)
                with pytest.raises(ValueError, match="not open"):
                    ledger.end(ticket, now, completed=False)
        assert ledger.open == len(open_requests)
        assert all(ledger.is_open(ticket) for ticket in open_requests)
    for ticket in open_requests:
        ledger.end(ticket, now, completed=False)
    assert ledger.open == 0
    check(ledger, jax.device_get(estimate(ledger.facts(now), request, params.engines)), params, [])


@functools.cache
def small() -> Any:
    env, params = jaxroute.make("paper-3", slots=6, metrics="off")
    return env, with_engines(params, usable_blocks=[40] * 3, max_num_seqs=[4] * 3)


def check(ledger: Ledger, state: Any, params: EnvParams, open_requests: list[Ticket]) -> None:
    """Invariants of an estimated state."""
    engines, queued = state.engines, state.queued
    assert (engines.num_requests <= ledger.count).all()  # fewer: a request reached its last possible token
    assert (engines.num_running >= 0).all() and (engines.num_running <= engines.num_requests).all()
    assert (engines.num_running <= params.engines.max_num_seqs).all()
    assert (np.asarray(used_blocks(engines, params.engines)) <= params.engines.usable_blocks).all()
    for expert, count in enumerate(engines.num_requests):
        numbers = [ticket.number for ticket in open_requests if ticket.expert == expert]
        assert set(queued.index[:count, expert]) <= set(numbers)
        assert (np.diff(queued.index[:count, expert]) > 0).all() and (
            np.diff(queued.arrival[:count, expert]) >= 0
        ).all()
        assert (engines.computed[:count, expert] <= (engines.prompt_tokens + engines.generated)[:count, expert]).all()
    assert np.isfinite(engines.clock).all() and np.isfinite(queued.arrival).all()


def test_a_full_queue_is_refused():
    ledger = Ledger(1, 2, np.array([0.01]))
    for _ in range(2):
        ledger.send(0, 0.0, 1, 1, 0.5, 10)
    with pytest.raises(ValueError, match="no free slot"):
        ledger.send(0, 0.0, 1, 1, 0.5, 10)


def test_one_program_for_every_number_of_requests():
    env, params = small()
    ledger = Ledger(env.num_experts, env.slots, np.full(env.num_experts, 0.015))
    request = jax.tree.map(np.asarray, params.workload.sample(jax.random.key(0), None)[2])
    count = lambda: estimate._cache_size()  # noqa: E731
    estimate(ledger.facts(0.0), request, params.engines)
    before = count()
    for number in range(6):
        ledger.send(number % 3, 0.1 * number, 10 + number, 5, 0.5, 50)
        ledger.arrive(0.1 * number)
        estimate(ledger.facts(0.1 * number), request, params.engines)
    assert count() == before


def test_streams_of_real_servers_give_the_simulators_state():
    """Three vLLM 0.33 servers with 40 KV blocks each, whose executor sleeps: times of chunks as the front end saw them.

    Recorded by `python -m benchmarks.live.cluster shortest_queue --rate 6 --blocks 40 --requests 90 --scale 8
    --streams PATH`, on two cores with other work. Times are s of the simulated clock.
    """
    data = np.load(Path(__file__).parent / "data" / "live_streams" / "paper-3_40_blocks.npz")
    actions, chunks, decided = data["actions"], data["chunks"], data["decided"]
    env, params = jaxroute.make("paper-3", metrics="off", penalty="off", episode_length=len(actions) + 1)
    workload = dataclasses.replace(params.workload, arrivals=PoissonArrivals.create(6.0))
    params = with_engines(params.replace(workload=workload), usable_blocks=[40] * 3, max_model_len=[640] * 3)
    run = jax.device_get(
        jax.jit(rollout, static_argnums=0, compiler_options=CHEAP_COMPILE)(env, params, jax.random.key(20), actions)
    )
    ledger = Ledger(3, env.slots, np.asarray(params.engines.latency.base))
    tickets: dict[int, Ticket] = {}
    place, same_length, same_running, gaps = 0, [], [], []
    for step, (action, now) in enumerate(zip(actions, decided, strict=True)):
        while place < len(chunks) and chunks[place, 0] <= now:
            at, number, tokens = float(chunks[place, 0]), int(chunks[place, 1]), int(chunks[place, 2])
            if number in tickets:
                ledger.progress(tickets[number], at, tokens)
                if tokens == run.before.request.output_tokens[number, actions[number]]:
                    ledger.end(tickets.pop(number), at, completed=True)
            place += 1
        before = jax.tree.map(lambda leaf, step=step: leaf[step], run.before)
        ledger.arrive(float(now))
        seen = jax.device_get(estimate(ledger.facts(float(now)), before.request, params.engines))
        same_length.append(before.engines.num_requests == seen.engines.num_requests)
        same_running.append(before.engines.num_running == seen.engines.num_running)
        gaps.append(abs(before.recent_gap - seen.recent_gap))
        request = before.request
        tickets[step] = ledger.send(
            int(action),
            float(now),
            int(request.prompt_tokens),
            int(request.predicted_output_tokens[action]),
            float(request.predicted_score[action]),
            300,
        )
    assert run.before.engines.preemptions.max() > 0
    assert np.mean(same_length) > 0.9 and np.mean(same_running) > 0.85
    assert np.median(gaps) < 0.005
