"""The sections and keys of a configuration: types, units and ranges. Defaults are in `configs/default.yaml` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any, Literal, NamedTuple


class Range(NamedTuple):
    """What a value must satisfy beyond its type; `text` ends the sentence "expected ..."."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Range("a number above 0", lambda value: isfinite(value) and value > 0)]
NonNegative = Annotated[float, Range("a number of 0 or more", lambda value: isfinite(value) and value >= 0)]
Fraction = Annotated[float, Range("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Whole = Annotated[int, Range("a whole number of 0 or more", lambda value: value >= 0)]
Count = Annotated[int, Range("a whole number of 1 or more", lambda value: value >= 1)]
KVTokens = Annotated[int, Range("a whole number from 16 to 2097151", lambda value: 16 <= value < 2**21)]
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)]
EvaluationEpisodes = Annotated[int, Range("a whole number of 2 or more, for an interval", lambda value: value >= 2)]
Discount = Annotated[float, Range("a number above 0, at most 1", lambda value: 0 < value <= 1)]
Span = Annotated[
    tuple[Positive, ...],
    Range("two numbers above 0, the smaller first", lambda value: len(value) == 2 and value[0] <= value[1]),
]
Names = Annotated[tuple[str, ...], Range("a list of one or more names", bool)]
Widths = Annotated[tuple[Count, ...], Range("a list of one or more whole numbers of 1 or more", bool)]

Loggers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
    Range("a list of tensorboard, wandb and mlflow, each at most once", lambda value: len(set(value)) == len(value)),
]


@dataclass(frozen=True)
class EnvironmentConfig:
    """The cluster, its latency limit and the reward (simulation.md sections 2, 4 and 5)."""

    id: str  # registered environment, the scenario; where a key is None, its own value holds
    path: str | None  # the file that azure and cluster need
    experts: Names | None
    profile: str | Names | None  # hardware profile of every expert, or one for each
    kv_cache_tokens: KVTokens | tuple[KVTokens, ...] | None  # KV cache, the same; None: the profile's own
    discipline: Literal["vllm_v1", "vllm_v0", "orca"] | None  # how every engine schedules (simulation.md section 1)
    max_model_len: KVTokens | None  # most tokens of a request, prompt and output; None: the profile's own
    slots: Count | None  # requests (running and waiting) that one engine can hold
    queue_nodes: Count | Literal["all"]  # running and waiting requests observed per expert, each; all: every one
    episode_length: Count  # requests per episode
    latency_limit: Positive | None  # L, seconds per output token
    penalty: Literal["predicted", "paper", "exact", "off"]  # form of the action impact estimator
    penalty_weight: NonNegative  # w
    drop: bool  # whether a router may drop a request


@dataclass(frozen=True)
class ArrivalsConfig:
    """When requests arrive."""

    kind: Literal["poisson", "trace", "piecewise"] | None  # None: the scenario's own arrivals
    rate: Positive | None  # poisson: requests per second; None: the scenario's own
    path: str | None  # trace: CSV (Azure 2023) or JSONL (Mooncake)
    rate_scale: Positive | None  # trace: 2 halves every gap; None: 1, or the scenario's own
    start: NonNegative | None  # trace: seconds of it to skip; None: a random row each episode
    durations: tuple[Positive, ...]  # piecewise: seconds of each piece
    rates: tuple[NonNegative, ...]  # piecewise: requests per second of each piece


@dataclass(frozen=True)
class RequestsConfig:
    """What arrives: lengths and scores."""

    kind: Literal["frozen", "jsonl", "trace"]  # trace: the lengths of the arrivals' trace
    path: str | None  # jsonl: MixInstruct-shaped file
    experts: Names | None  # jsonl: model names in the file, one per expert of the environment
    score: str  # jsonl: name of the score under candidates[].scores
    max_prompt_tokens: Count | None  # jsonl: longer prompts are cut to it; None: none is
    max_output_tokens: Count | None  # jsonl: longer answers are cut to it; None: none is
    true_lengths: bool  # routers see the true output lengths as predictions


@dataclass(frozen=True)
class WorkloadConfig:
    arrivals: ArrivalsConfig
    requests: RequestsConfig


@dataclass(frozen=True)
class NetworkConfig:
    """Shapes of the heterogeneous graph attention network and the heads on it (simulation.md section 5)."""

    kind: Literal["han", "han_jraph", "flat"]  # flat: perceptrons on one vector; of the keys below it has mlp
    hidden: Count
    heads: Count
    layers: Count
    residual: bool
    mlp: Widths


@dataclass(frozen=True)
class AgentConfig:
    """Fields of `learner.sac.Hyperparameters`, which change no shape (simulation.md section 6)."""

    actor_learning_rate: NonNegative
    critic_learning_rate: NonNegative
    alpha_learning_rate: NonNegative
    gamma: Discount
    tau: Fraction
    target_entropy_ratio: Fraction
    initial_temperature: Positive
    max_grad_norm: Positive
    warmup_frames: Whole
    reward_centering_rate: Fraction
    final_learning_rate: Fraction


@dataclass(frozen=True)
class TrainingConfig:
    """Length, shapes and environments of training; the shapes are the fields of `learner.trainer.SACConfig`."""

    frames: Count  # decisions in all, over all environments
    num_envs: Count
    buffer_capacity: Count  # transitions
    batch_size: Count
    updates_per_step: Count
    steps_per_chunk: Count  # steps of all environments between two lines of metrics
    rate_range: Span | None  # poisson: rate, trace: rate_scale, spread over the environments; None: as evaluated
    latency_limit_range: Span | None  # L, spread over the environments; None: as evaluated
    warm_start: str | None  # router that makes every other decision of the warm-up; None: all are random
    checkpoint_seconds: NonNegative  # from one save of the whole state to the next; 0: after every chunk
    checkpoints_kept: Count
    loggers: Loggers  # where metrics go beside metrics.jsonl
    seed: Seed


@dataclass(frozen=True)
class EvaluationConfig:
    episodes: EvaluationEpisodes
    seed: Seed
    routers: Names  # trained, and any of `environment.routers.ROUTERS`


@dataclass(frozen=True)
class Config:
    environment: EnvironmentConfig
    workload: WorkloadConfig
    network: NetworkConfig
    agent: AgentConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
