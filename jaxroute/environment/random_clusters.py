"""Random clusters, by number: what a router for any cluster is trained on, and is tested on with numbers held out.

Everything that differs between two clusters of one size is traced, so that they share a program, and their parameters
can be stacked for `jax.vmap` or `jax.lax.map`.
"""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxroute.environment.disturbances import FAILED, Disturbances
from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.registry import environment_of, params_of
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.simulator import catalogue
from jaxroute.simulator.engine import EngineParams
from jaxroute.simulator.engine_config import BLOCK_SIZE, engine_from_config, stack_engines
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.presets import PRESETS
from jaxroute.simulator.profiles import EXPERTS, PROFILES, TIMED_GPUS, profile_of_gpu
from jaxroute.simulator.roofline import MODELS, roofline
from jaxroute.workload.arrivals import MarkovArrivals
from jaxroute.workload.lognormal import LognormalRequests
from jaxroute.workload.workload import Workload

HELD_OUT = 1_000_000
"""No training of the package's router uses clusters from this number on."""

_SEED = 0x636C7573
_MOST_PROMPT, _MOST_OUTPUT = 12_000, 2_000
_FULL = 0.8  # share of the slots that a cluster at its capacity uses at most
_IN_TIME = 0.9  # share of the limit that a request takes at an expert's capacity


def random_cluster(
    number: int, num_experts: int, slots: int, episode_length: int, two_limits: bool = False
) -> EnvParams:
    """Parameters of the cluster `number`, which has 1 to `num_experts` experts; no request fits the other places.

    Engines, lengths, scores, predictors, limits, loads, bursts and disturbances are drawn as docs/environment.md says;
    the load is relative to what the cluster serves in time with `slots` requests an expert. `two_limits`: a request has
    limits on TTFT and TPOT instead of one on its latency per token. Raises `UserError`.
    """
    number, two_limits = _checked(number), _boolean(two_limits)
    random = np.random.default_rng((_SEED, number, num_experts))
    there = np.sort(random.permutation(num_experts)[: 1 + random.integers(num_experts)])
    latencies, engines = _engines(random, num_experts)
    engines = engines.replace(max_model_len=jnp.where(np.isin(np.arange(num_experts), there), engines.max_model_len, 0))
    prompt, output = _log_uniform(random, 30, 4000), _log_uniform(random, 20, 500)
    requests = _requests(random, num_experts, prompt, output)
    mean_outputs = np.exp(np.asarray(requests.log_output_mean) + float(requests.log_output_std) ** 2 / 2)
    mean_prompt = prompt * np.exp(float(requests.log_prompt_std) ** 2 / 2)

    alone = np.array([_alone(latencies[expert], mean_prompt, float(mean_outputs[expert])) for expert in there])
    ttft, tpot = np.median(alone, axis=0) * (_log_uniform(random, 2, 30), _log_uniform(random, 1.3, 4))
    mean_output = mean_outputs[there].mean()
    prefill = ttft if two_limits else np.median(alone[:, 0])
    limit = float(tpot + (prefill - tpot) / mean_output)
    seats = _seats(engines, mean_prompt, mean_outputs, slots)
    capacity = sum(
        _capacity(latencies[expert], limit, mean_prompt, float(mean_outputs[expert]), float(seats[expert]))
        for expert in there
    )
    params = params_of(
        Workload.create(_arrivals(random, capacity * _log_uniform(random, 0.2, 2), mean_output * tpot), requests),
        engines,
        limit,
        float(random.choice([256.0, 2048.0])),
    )
    params = params.replace(disturbances=_disturbances(random, there, num_experts, episode_length))
    if two_limits:
        params = params.replace(ttft_limit=jnp.asarray(ttft, float), tpot_limit=jnp.asarray(tpot, float))
    return params


def _checked(number: Any) -> int:
    try:
        if not isinstance(number, bool) and operator.index(number) >= 0:
            return operator.index(number)
    except TypeError:
        pass
    raise UserError(f"number of a random cluster: must be a whole number of 0 or more, not {number!r}")


def _boolean(two_limits: Any) -> bool:
    if not isinstance(two_limits, bool):
        raise UserError(f"two_limits of a random cluster: must be True or False, not {two_limits!r}")
    return two_limits


def random_environment(
    number: int = 0, num_experts: int = 6, two_limits: bool = False, **options: Any
) -> tuple[RoutingEnvironment, EnvParams]:
    """The environment `random-cluster` and the parameters of cluster `number`. Raises `UserError`."""
    env = environment_of(num_experts, options, slots=64)
    return env, random_cluster(number, num_experts, env.slots, env.episode_length, two_limits)


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** random.random())


def _engines(random: np.random.Generator, num_experts: int) -> tuple[list[np.ndarray], EngineParams]:
    """The latency coefficients of each expert, and the engines, as vLLM 0.33 runs them by default."""
    same, spread = random.random() < 0.3, _log_uniform(random, 1, 1.5)
    latencies, engines = [], []
    hardware = _hardware(random)
    for expert in range(num_experts):
        if expert and not same:
            hardware = _hardware(random)
        latency, tokens = hardware
        own = np.array(latency)
        own[[0, 1, 2, 3, 5]] *= _log_uniform(random, 1 / spread, spread)
        kv_tokens = float(np.clip(tokens * _log_uniform(random, 0.1, 1), 4000, 1_000_000))
        options = {
            **PRESETS["vllm-0.33"].switches,
            "latency": own.tolist(),
            "num_gpu_blocks": int(kv_tokens) // BLOCK_SIZE + 1,
            "max_num_seqs": 256 if random.random() < 0.7 else round(_log_uniform(random, 8, 64)),
            "max_num_batched_tokens": int(random.choice([2048, 8192])),
            "max_model_len": _MOST_PROMPT + _MOST_OUTPUT,
        }
        latencies.append(own)
        engines.append(engine_from_config(options, "random cluster"))
    return latencies, stack_engines(engines, "random cluster")


def _hardware(random: np.random.Generator) -> tuple[list[float], int]:
    """Latency coefficients [c0, c1, c2, c3, knee, c4] and tokens of the KV cache: measured, or a roofline guess."""
    kind = random.random()
    if kind < 0.35:
        expert = str(random.choice([name for name, one in EXPERTS.items() if one.weights_gb < 15]))
        profile = profile_of_gpu(str(random.choice(TIMED_GPUS)), expert)
        return [*profile.latency], profile.usable_blocks * BLOCK_SIZE
    if kind < 0.6:
        engine = catalogue.load_profile(str(random.choice(catalogue.shipped())))["engine"]
        return [*engine["latency"], 0.0, 0.0][:6], (engine["num_gpu_blocks"] - 1) * BLOCK_SIZE
    if kind < 0.7:
        paper = PROFILES["paper"]
        return [*paper.latency, 0.0, 0.0][:6], paper.usable_blocks * BLOCK_SIZE
    while True:
        gpu, model = GPUS[str(random.choice(list(GPUS)))], MODELS[str(random.choice(list(MODELS)))]
        try:
            guess = roofline(gpu, model, int(random.choice([1, 2, 4])))
        except UserError:  # the model does not fit
            continue
        # Real servers have an overhead for each iteration and do not reach the peak rates.
        base, *others = guess["latency"]
        slower = _log_uniform(random, 1.1, 2)
        latency = [base * slower + random.uniform(0.001, 0.005), *(time * slower for time in others)]
        latency[4] = guess["latency"][4]
        return latency, guess["num_gpu_blocks"] * BLOCK_SIZE


def _requests(random: np.random.Generator, num_experts: int, prompt: float, output: float) -> LognormalRequests:
    def known() -> float:
        kind = random.random()
        return 0.0 if kind < 0.15 else 1.0 if kind > 0.85 else random.random()

    centre, spread = random.uniform(0.3, 0.8), _log_uniform(random, 0.01, 0.2)
    verbosity = random.uniform(0, 0.3)
    values: dict[str, Any] = {
        "log_prompt_mean": np.log(prompt),
        "log_prompt_std": random.uniform(0.3, 1.0),
        "log_output_mean": np.log(output) + verbosity * random.standard_normal(num_experts),
        "log_output_std": random.uniform(0.3, 0.9),
        "output_shared": random.random(),
        "length_known": known(),
        "score_mean": np.clip(centre + spread * random.standard_normal(num_experts), 0.05, 0.95),
        "score_shared_std": random.uniform(0, 0.1),
        "score_std": random.uniform(0.02, 0.15),
        "score_known": known(),
    }
    return LognormalRequests(
        **{name: jnp.asarray(value, float) for name, value in values.items()},
        most_prompt_tokens=jnp.int32(_MOST_PROMPT),
        most_output_tokens=jnp.int32(_MOST_OUTPUT),
    )


def _iteration(latency: np.ndarray, prefill: float, decodes: float, context: float) -> float:
    """Seconds of an iteration, as `latency.iteration_time`."""
    base, per_prefill, per_decode, per_context, knee, above = latency
    return float(
        base
        + per_prefill * prefill
        + per_decode * decodes
        + per_context * context
        + above * max(prefill + decodes - knee, 0)
    )


def _alone(latency: np.ndarray, prompt: float, output: float) -> tuple[float, float]:
    """Seconds to the first token, and for each further one, of a request alone."""
    return _iteration(latency, prompt, 0, 0), _iteration(latency, 0, 1, prompt + output / 2)


def _seats(engines: EngineParams, prompt: float, outputs: np.ndarray, slots: int) -> np.ndarray:
    """Requests [N] that may run at once."""
    tokens = np.asarray(engines.usable_blocks) * BLOCK_SIZE
    return np.minimum(np.minimum(tokens / (prompt + outputs / 2), np.asarray(engines.max_num_seqs)), _FULL * slots)


def _capacity(latency: np.ndarray, limit: float, prompt: float, output: float, seats: float) -> float:
    """Requests/s of an expert whose requests just take `_IN_TIME` of the limit, or of one request at a time.

    With B running requests, B of them end and B others are prefilled while a request decodes its output.
    """
    first, best = _iteration(latency, prompt, 0, 0) - float(latency[0]), 0.0
    for batch in range(1, max(int(seats), 1) + 1):
        decode = _iteration(latency, 0, batch, batch * (prompt + output / 2))
        seconds = decode * output + batch * first
        if batch == 1 or seconds / output < _IN_TIME * limit:
            best = max(best, batch / seconds)
    return best


def _arrivals(random: np.random.Generator, rate: float, response: float) -> MarkovArrivals:
    """Poisson arrivals with this mean rate, 1/s, or bursts of some response times of `response` s."""
    if random.random() < 0.5:
        return MarkovArrivals.create((rate, rate), (1.0, 1.0))
    factor, share = random.uniform(2, 6), random.uniform(0.05, 0.3)
    calm = rate / (1 + share * (factor - 1))
    duration = response * _log_uniform(random, 1, 20)
    return MarkovArrivals.create((calm, factor * calm), (duration * (1 - share) / share, duration))


def _disturbances(
    random: np.random.Generator, there: np.ndarray, num_experts: int, episode_length: int
) -> Disturbances:
    """In three of four clusters none; else one expert is slow, hangs or answers worse for a part of an episode."""
    slowness, quality = np.ones((3, num_experts)), np.ones((3, num_experts))
    kind, begin, share = random.random(), random.random(), random.uniform(0.1, 0.5)
    expert = random.choice(there)
    if kind < 0.1:
        slowness[1, expert] = _log_uniform(random, 1.5, 4)
    elif kind < 0.15 and len(there) > 1:
        slowness[1, expert] = FAILED
    elif kind < 0.25:
        quality[1, expert] = random.uniform(0.5, 0.9)
    first = 1 + int(begin * (1 - share) * episode_length)
    return Disturbances.create([0, first, first + max(int(share * episode_length), 1)], slowness, quality)
