"""The estimated parameters, their scale, and the servers that they describe.

The scale is the logarithm of the parameter plus an offset, about a tenth of its usual value. Far above the offset the
scale is logarithmic. Below it is linear, so that a coefficient that was estimated as 0 can increase again.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.calibration.candidates import Candidates
from jaxroute.calibration.logs import ServerLog
from jaxroute.calibration.options import ServerOptions
from jaxroute.simulator.engine import EngineParams, LatencyModel
from jaxroute.simulator.engine_config import BLOCK_SIZE, engine_from_config

LATENCY = ("base", "per_prefill_token", "per_decode", "per_context_token", "knee_tokens", "per_token_above_knee")
"""Coefficients in the order of `LatencyModel`."""

_BOUNDS = {  # minimum, maximum and offset
    "base": (1e-4, 2.0, 0.0),
    "per_prefill_token": (0.0, 1e-2, 1e-5),
    "per_decode": (0.0, 1e-1, 2e-5),
    "per_context_token": (0.0, 1e-4, 3e-8),
    "knee_tokens": (8.0, 1024.0, 0.0),  # above, most iterations would be below the knee, and the slopes not separable
    "per_token_above_knee": (0.0, 1e-2, 1e-5),
}
PREFIX_HITS = "prefix_hits"
"""Share of the shared prompt tokens that the server's prefix cache saved."""

OVERHEAD = "request_overhead"
"""s that a request spends outside of the engine before it: tokenizer, network. It only shifts the request's times."""


@dataclass(frozen=True)
class Parameter:
    """A parameter between `low` and `high`; the search starts with `spread` (on its scale) around `start`."""

    name: str
    low: float
    high: float
    start: float
    spread: float = 0.7
    offset: float = 0.0

    def scaled(self, value: float) -> float:
        """A value on the parameter's scale, log(value + offset)."""
        return float(np.log(value + self.offset))


@dataclass(frozen=True)
class Space:
    """The estimated parameters, and the fixed values: an engine with fields [], which the parameters override."""

    parameters: tuple[Parameter, ...]
    engine: EngineParams
    num_engines: int

    @property
    def names(self) -> list[str]:
        """Of the P parameters, in the order of every point."""
        return [parameter.name for parameter in self.parameters]

    @property
    def start(self) -> np.ndarray:
        """The first guess on the scale of the parameters, float64 [P]."""
        return np.asarray([parameter.scaled(parameter.start) for parameter in self.parameters])

    @property
    def spread(self) -> np.ndarray:
        """Standard deviations of the first generation around `start`, float64 [P]."""
        return np.asarray([parameter.spread for parameter in self.parameters])

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Minimum and maximum of each parameter on its scale, [P] and [P]."""
        low, high = np.asarray([(own.scaled(own.low), own.scaled(own.high)) for own in self.parameters]).T
        return low, high

    @property
    def offsets(self) -> np.ndarray:
        """What is added to each parameter before its logarithm, float64 [P]."""
        return np.asarray([parameter.offset for parameter in self.parameters])

    def values(self, point: np.ndarray) -> dict[str, float]:
        """The parameters by name at a point [P]."""
        values = np.maximum(np.exp(point) - self.offsets, [parameter.low for parameter in self.parameters])
        return dict(zip(self.names, values.tolist(), strict=True))


def servers_at(names: tuple[str, ...], values_of: jax.Array, engine: EngineParams) -> Candidates:
    """K servers with the values of the parameters `names`, float [K, P]; all else is from `engine`, with fields []."""
    values = dict(zip(names, values_of.T, strict=True))
    count = values_of.shape[0]
    engine = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count,)), engine)
    engine = engine.replace(latency=LatencyModel(*(values[name] for name in LATENCY)))
    if "num_gpu_blocks" in values:
        engine = engine.replace(usable_blocks=jnp.round(values["num_gpu_blocks"]).astype(jnp.int32) - 1)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if name in values:
            engine = engine.replace(**{name: jnp.round(values[name]).astype(jnp.int32)})
    return Candidates(engine, values.get(PREFIX_HITS, jnp.zeros(count)))


def peak_tokens(log: ServerLog) -> int:
    """Maximum number of tokens of requests between first and last token at once, which the KV cache contained."""
    times = np.concatenate([log.first_token, log.finish])
    times = times[np.linspace(0, len(times) - 1, min(len(times), 1000)).astype(int)]
    most = 0.0
    for time in times:
        running = (log.first_token <= time) & (time <= log.finish)
        length = np.maximum(log.finish - log.first_token, 1e-9)
        share = np.clip((time - log.first_token) / length, 0, 1)
        most = max(most, float(np.sum(np.where(running, log.prompt_tokens + share * log.output_tokens, 0))))
    return int(most)


def peak_running(log: ServerLog) -> int:
    """Maximum number of requests between their first and last token at once."""
    times = np.concatenate([log.first_token, log.finish])
    steps = np.concatenate([np.ones(len(log)), -np.ones(len(log))])
    return int(np.cumsum(steps[np.lexsort((steps, times))]).max())


def search_space(log: ServerLog, options: ServerOptions) -> Space:
    """The parameters to estimate. The initial coefficients are computed from the times of the log.

    max_model_len is not estimated: from the longest request on, its value changes no schedule.
    """
    measured = log.measured
    token_time = float(np.nanquantile(measured["tpot"], 0.05)) if np.isfinite(measured["tpot"]).any() else 0.02
    starts = (0.7 * token_time, 5e-5, 2e-5, 1e-7, 256.0, 5e-5)
    parameters = []
    for name, start in zip(LATENCY, starts, strict=True):
        low, high, offset = _BOUNDS[name]
        start = float(np.clip(start, 3 * low, high / 3))
        parameters.append(Parameter(name, low, high, start, offset=offset))
    engine = dict(options.engine)
    running = max(peak_running(log) // options.data_parallel_size, 1)
    if "num_gpu_blocks" not in engine:
        size = engine.get("block_size", BLOCK_SIZE)
        held = peak_tokens(log) / options.data_parallel_size
        least = max(-(-log.longest // size) + 1, 2)
        start = max(1.3 * held / size, 1.05 * least)
        parameters.append(Parameter("num_gpu_blocks", least, max(20 * start, 2 * least), start, 0.4))
    if "max_num_seqs" not in engine:
        parameters.append(Parameter("max_num_seqs", max(0.5 * running, 1.0), 8.0 * running + 8, 1.3 * running + 1, 0.4))
    if "max_num_batched_tokens" not in engine:
        parameters.append(Parameter("max_num_batched_tokens", max(64, running), 65536, 2048, 0.5))
    shares = log.shared_tokens is not None and log.shared_tokens.any()
    if shares and options.enable_prefix_caching and options.version is None:
        parameters.append(Parameter(PREFIX_HITS, 0.0, 1.0, 0.5, offset=0.1))
    parameters.append(Parameter(OVERHEAD, 0.0, 10.0, 2e-3, offset=1e-3))
    engine.setdefault("max_model_len", max_model_len(log))
    return Space(tuple(parameters), engine_from_config(engine, options.source), options.data_parallel_size)


def max_model_len(log: ServerLog) -> int:
    """The value of an unknown max_model_len: the longest request, rounded up to a multiple of 1,024 tokens."""
    return -(-(log.longest + 1) // 1024) * 1024
