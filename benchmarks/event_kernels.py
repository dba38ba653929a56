"""The compiled functions of `event_simulator`. They are in one file, since numba caches a function only for its file.

Numbers in comments are the rules of simulation.md section 1.
"""

# pyright: basic
# numba infers the types of the arguments.

from __future__ import annotations

import math

import numba
import numpy as np

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")

LARGE = 2**30
SERVED_BY_EXPERT, REJECTED_FULL, REJECTED_INFEASIBLE = 0, 1, 2  # fates of a routed request
STATUS = ("ok", "stalled", "max_iterations")

OPTIONS = (
    "usable_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "long_prefill_token_threshold",
    "enable_chunked_prefill",
    "reserve_full_isl",
)
LATENCY = (
    "base",
    "per_prefill_token",
    "per_decode",
    "per_context_token",
    "knee_tokens",
    "per_token_above_knee",
)
ENGINE = np.dtype(
    [(name, np.float64) for name in LATENCY]
    + [(name, np.int64) for name in OPTIONS]
    + [
        ("clock", np.float64),  # s, start of the next iteration
        ("requests", np.int64),  # requests in the queue; the first `running` of them run
        ("running", np.int64),
        ("context", np.int64),  # computed tokens of the running requests
        ("lag", np.int64),  # finished decode iterations that are not yet written to the running requests
        ("decoding", np.int64),  # 1: every running request only decodes
        ("remaining", np.int64),  # iterations to the first completion, if all requests decode
        ("planned", np.int64),  # plain iterations to the next event; 0: the next iteration is of another kind
        ("iterations", np.int64),
        ("idle_iterations", np.int64),  # consecutive iterations that scheduled nothing
        ("prefill_tokens", np.int64),
        ("decodes", np.int64),
        ("context_tokens", np.int64),
        ("entries", np.int64),  # scheduled requests, summed over iterations
    ]
)
REQUEST = np.dtype([(name, np.int32) for name in ("id", "prompt", "target", "generated", "computed", "tokens")])
SERVED = np.dtype(
    [("first_token", np.float64), ("finish", np.float64), ("preemptions", np.int32), ("emitted", np.int32)]
)
ROUTED = np.dtype([("expert", np.int32), ("fate", np.int32)])


@compiled
def _blocks(tokens, block_size):
    return (tokens + block_size - 1) // block_size


@compiled
def _started_before(first, growth, gap):
    """Number of iterations of a decode run that start less than `gap` seconds (> 0) after its beginning."""
    linear = first - 0.5 * growth
    root = 2.0 * gap / (linear + math.sqrt(linear * linear + 2.0 * growth * gap))
    count = max(math.ceil(min(root, float(LARGE))), 1)
    if count > 1 and _run_time(first, growth, count - 1) >= gap:
        count -= 1
    if _run_time(first, growth, count) < gap:
        count += 1
    return count


@compiled
def _run_time(first, growth, count):
    return first * count + growth * (0.5 * count * (count - 1))


@compiled
def _decode_run(engine):
    """Seconds of the first iteration of a decode run, and the increase per iteration."""
    batch = engine.running
    first = engine.base + engine.per_decode * batch + engine.per_context_token * (engine.context + batch)
    if batch > engine.knee_tokens:
        first += engine.per_token_above_knee * (batch - engine.knee_tokens)
    return first, engine.per_context_token * batch


@compiled
def _blocks_after(engine, queue, iterations):
    total = 0
    for i in range(engine.running):
        total += _blocks(queue[i].computed + engine.lag + iterations, engine.block_size)
    return total


@compiled
def _is_blocked(engine, queue):
    """Whether the head of `waiting` cannot join the decoding batch (rules 4 and 5)."""
    batch, size = engine.running, engine.block_size
    if batch >= engine.max_num_seqs:
        return True
    head = queue[batch]
    length = head.prompt + head.generated
    wanted = length
    if engine.long_prefill_token_threshold > 0:
        wanted = min(wanted, engine.long_prefill_token_threshold)
    tokens = min(wanted, engine.max_num_batched_tokens - batch)
    if tokens <= 0 or (tokens < wanted and not engine.enable_chunked_prefill):
        return True
    left = engine.usable_blocks - _blocks(length if engine.reserve_full_isl else tokens, size)
    if engine.context + batch * size <= left * size:  # fits for any rounding of blocks
        return False
    return _blocks_after(engine, queue, 1) > left


@compiled
def _plan(engine, queue):
    """Plans the next run of plain iterations; returns the start of the last of them (s), or inf if idle."""
    engine.planned = 0
    batch = engine.running
    if engine.requests == 0:
        return math.inf
    if batch == 0 or not engine.decoding or batch > engine.max_num_batched_tokens:
        return engine.clock
    if engine.requests > batch and not _is_blocked(engine, queue):
        return engine.clock
    count = engine.remaining
    room = engine.usable_blocks * engine.block_size
    if (
        engine.context + batch * (count + engine.block_size - 1) > room
    ):  # may not fit, depending on the rounding of blocks
        low, high = 0, count
        while low < high:
            middle = (low + high + 1) // 2
            if _blocks_after(engine, queue, middle) <= engine.usable_blocks:
                low = middle
            else:
                high = middle - 1
        count = low
    engine.planned = count
    if count <= 1:
        return engine.clock
    first, growth = _decode_run(engine)
    return engine.clock + _run_time(first, growth, count - 1)


@compiled
def _decode(engine, queue, count, served):
    """Runs `count` plain iterations, and removes the requests that finish with the last one."""
    batch = engine.running
    first, growth = _decode_run(engine)
    engine.clock += _run_time(first, growth, count)
    engine.iterations += count
    engine.entries += batch * count
    engine.decodes += batch * count
    engine.context_tokens += engine.context * count + batch * (count * (count + 1) // 2)
    engine.context += batch * count
    engine.lag += count
    engine.remaining -= count
    if engine.remaining == 0:
        _take_out_decoded(engine, queue, served)


@compiled
def _take_out_decoded(engine, queue, served):
    kept, remaining, context = 0, LARGE, 0
    for i in range(engine.requests):
        request = queue[i]
        if i < engine.running:
            request.generated += engine.lag
            request.computed += engine.lag
            if request.generated >= request.target:
                _finish(request, engine.clock, served)
                continue
            remaining = min(remaining, request.target - request.generated)
            context += request.computed
        if kept < i:
            queue[kept] = queue[i]
        kept += 1
    engine.running -= engine.requests - kept
    engine.requests, engine.remaining, engine.context, engine.lag = kept, remaining, context, 0


@compiled
def _finish(request, clock, served):
    served[request.id].finish = clock
    served[request.id].emitted = request.generated


@compiled
def _iterate(engine, queue, served):
    """Schedules and executes one iteration of any kind."""
    size, threshold = engine.block_size, engine.long_prefill_token_threshold
    if threshold == 0:
        threshold = LARGE
    free = engine.usable_blocks
    for i in range(engine.running):
        queue[i].generated += engine.lag
        queue[i].computed += engine.lag
        free -= _blocks(queue[i].computed, size)
    engine.lag = 0
    budget, running, preempted = engine.max_num_batched_tokens, engine.running, False

    i = 0
    while i < running:  # 2
        request = queue[i]
        tokens = min(
            request.prompt + request.generated - request.computed,
            threshold,
            budget,
            engine.max_model_len - 1 - request.computed,
        )
        request.tokens = max(tokens, 0)
        if tokens > 0:
            held = _blocks(request.computed, size)
            missing = _blocks(request.computed + tokens, size) - held
            while missing > free and running > i:  # 3
                running -= 1
                victim = queue[running]
                free += _blocks(victim.computed, size)
                victim.computed = 0
                served[victim.id].preemptions += 1
                preempted = True
            if running == i:
                break
            free -= missing
            budget -= tokens
        i += 1

    if not preempted:  # 4, 5
        while running < engine.requests and budget > 0 and running < engine.max_num_seqs:
            request = queue[running]
            length = request.prompt + request.generated
            tokens = min(length, threshold)
            if tokens > budget and not engine.enable_chunked_prefill:
                break
            tokens = min(tokens, budget)
            missing = _blocks(tokens, size)
            if missing > free or (engine.reserve_full_isl and _blocks(length, size) > free):
                break
            request.tokens = tokens
            free -= missing
            budget -= tokens
            running += 1

    prefill, decodes, context, entries = 0, 0, 0, 0
    for i in range(running):
        request = queue[i]
        if request.tokens > 0:
            entries += 1
            context += request.computed + request.tokens
            if (
                request.tokens == 1
                and request.generated > 0
                and request.computed == request.prompt + request.generated - 1
            ):
                decodes += 1
            else:
                prefill += request.tokens
    engine.clock += (
        engine.base
        + engine.per_prefill_token * prefill
        + engine.per_decode * decodes
        + engine.per_context_token * context
        + engine.per_token_above_knee * max(prefill + decodes - engine.knee_tokens, 0.0)
    )
    engine.iterations += 1
    engine.idle_iterations = 0 if entries else engine.idle_iterations + 1
    engine.prefill_tokens += prefill
    engine.decodes += decodes
    engine.context_tokens += context
    engine.entries += entries

    kept, remaining, context, decoding = 0, LARGE, 0, 1
    for i in range(engine.requests):
        request = queue[i]
        if i < running:
            request.computed += request.tokens
            if request.tokens > 0 and request.computed >= request.prompt + request.generated:  # 6
                if request.generated == 0:
                    served[request.id].first_token = engine.clock
                request.generated += 1
                if request.generated >= request.target:  # 7
                    _finish(request, engine.clock, served)
                    continue
            if request.generated == 0 or request.computed != request.prompt + request.generated - 1:
                decoding = 0
            remaining = min(remaining, request.target - request.generated)
            context += request.computed
        if kept < i:
            queue[kept] = queue[i]
        kept += 1
    engine.running = running - (engine.requests - kept)
    engine.requests, engine.remaining, engine.context, engine.decoding = kept, remaining, context, decoding


@compiled
def _step(engine, queue, until, most, served):
    """Runs a busy engine to its next event, but at most `most` iterations and none that starts at or after `until` (s).

    The engine's clock must be before `until`. Returns the result of `_plan`.
    """
    if engine.planned > 0:
        count = min(engine.planned, most)
        if until < math.inf:
            first, growth = _decode_run(engine)
            count = min(count, _started_before(first, growth, until - engine.clock))
        _decode(engine, queue, count, served)
    else:
        _iterate(engine, queue, served)
    return _plan(engine, queue)


@compiled
def _join(engine, queue, identifier, prompt, output, now):
    """Puts a request at the tail of `waiting`. Returns the result of `_plan`."""
    if engine.requests == 0:
        engine.clock = max(engine.clock, now)
    request = queue[engine.requests]
    request.id = identifier
    request.prompt = prompt
    request.target = max(min(output, engine.max_model_len - prompt), 1)
    request.generated = 0
    request.computed = 0
    engine.requests += 1
    return _plan(engine, queue)


@compiled
def replay(engines, queue, times, indices, by_iteration, prompt, output, most_iterations, stall_iterations, served):
    """Runs `engines[0]` on R requests in order of arrival. Returns the index of its status in `STATUS`."""
    engine = engines[0]
    joined, count, skipped, status = 0, len(prompt), 0, 0
    while joined < count or engine.requests > 0:
        if engine.iterations >= most_iterations:
            status = 2
            break
        if engine.requests == 0:
            if by_iteration:
                skipped = max(skipped, indices[joined] - engine.iterations)
            else:
                engine.clock = max(engine.clock, times[joined])
        until, most = math.inf, most_iterations - engine.iterations
        while joined < count:
            if by_iteration and indices[joined] > engine.iterations + skipped:
                most = min(most, indices[joined] - engine.iterations - skipped)
                break
            if not by_iteration and times[joined] > engine.clock:
                until = times[joined]
                break
            _join(engine, queue, joined, prompt[joined], output[joined], engine.clock)
            joined += 1
        _step(engine, queue, until, most, served)
        if engine.idle_iterations >= stall_iterations and joined == count:
            status = 1
            break
    for i in range(engine.requests):  # unfinished requests
        lag = engine.lag if i < engine.running else 0
        served[queue[i].id].emitted = queue[i].generated + lag
    return status


@compiled
def shortest_queue(engines, slots, gap, prompt, output, served, routed):
    """Runs N engines on T arrivals under Shortest Queue First until all are done; fills `served` and `routed`."""
    num_experts, count = len(engines), len(gap)
    queues = np.zeros((num_experts, slots), REQUEST)
    event = np.full(num_experts, math.inf)  # start of each engine's next event
    length = np.zeros(num_experts, np.int64)
    now = 0.0
    for arrival in range(count + 1):
        now = now + gap[arrival] if arrival < count else math.inf
        for i in range(num_experts):
            while event[i] < now:
                event[i] = _step(engines[i], queues[i], math.inf, LARGE, served)
                length[i] = engines[i].requests
        if arrival == count:
            break
        chosen = 0
        for i in range(1, num_experts):
            if length[i] < length[chosen]:
                chosen = i
        engine, queue = engines[chosen], queues[chosen]
        expert_output = output[arrival, chosen]
        routed[arrival].expert = chosen
        if not _feasible(engine, prompt[arrival], expert_output):
            routed[arrival].fate = REJECTED_INFEASIBLE
        elif length[chosen] >= slots:
            routed[arrival].fate = REJECTED_FULL
        else:
            if length[chosen] > 0 and engine.clock < now:
                _step(engine, queue, now, LARGE, served)
            event[chosen] = _join(engine, queue, arrival, prompt[arrival], expert_output, now)
            length[chosen] += 1


@compiled
def _feasible(engine, prompt, output):
    """Whether the engine can finish the request (rule 8)."""
    if prompt >= engine.max_model_len:
        return False
    if not engine.enable_chunked_prefill and prompt + output - 1 > engine.max_num_batched_tokens:
        return False
    return _blocks(min(prompt + output, engine.max_model_len) - 1, engine.block_size) <= engine.usable_blocks


@compiled
def totals(gap, score, latency_limit, served, routed):
    """Completed requests, the sum of their QoS, and the requests rejected as the queue was full and as infeasible."""
    now, completed, qos, full, infeasible = 0.0, 0, 0.0, 0, 0
    for i in range(len(gap)):
        now += gap[i]
        if routed[i].fate == REJECTED_FULL:
            full += 1
        elif routed[i].fate == REJECTED_INFEASIBLE:
            infeasible += 1
        else:
            completed += 1
            if (served[i].finish - now) / served[i].emitted < latency_limit:
                qos += score[i, routed[i].expert]
    return completed, qos, full, infeasible
