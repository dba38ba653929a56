"""The sections and keys of a configuration: types, units and ranges. `configs/default.yaml` has all defaults."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any, Literal, NamedTuple

from jaxroute.environment.settings import Features, Penalty, PrefixShare, Signals
from jaxroute.simulator.disciplines import DISCIPLINES
from jaxroute.simulator.engine_config import BLOCK_SIZE
from jaxroute.simulator.presets import PRESETS
from jaxroute.workload.files import MOST_TOKENS


class Range(NamedTuple):
    """A condition on a value in addition to its type; `text` completes the sentence "expected ..."."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Range("a number above 0", lambda value: isfinite(value) and value > 0)]
NonNegative = Annotated[float, Range("a number of 0 or more", lambda value: isfinite(value) and value >= 0)]
Fraction = Annotated[float, Range("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Whole = Annotated[int, Range("a whole number of 0 or more", lambda value: value >= 0)]
Count = Annotated[int, Range("a whole number of 1 or more", lambda value: value >= 1)]
KVTokens = Annotated[
    int,
    Range(f"a whole number from {BLOCK_SIZE} to {MOST_TOKENS}", lambda value: BLOCK_SIZE <= value <= MOST_TOKENS),
]
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)]
EvaluationEpisodes = Annotated[int, Range("a whole number of 2 or more, for an interval", lambda value: value >= 2)]
Discount = Annotated[float, Range("a number above 0, at most 1", lambda value: 0 < value <= 1)]
Span = Annotated[
    tuple[Positive, ...],
    Range("two numbers above 0, the smaller first", lambda value: len(value) == 2 and value[0] <= value[1]),
]
Discipline = Annotated[str, Range(f"one of {', '.join(DISCIPLINES)}", lambda value: value in DISCIPLINES)]
Version = Annotated[str, Range(f"one of {', '.join(PRESETS)}", lambda value: value in PRESETS)]
Names = Annotated[tuple[str, ...], Range("a list of one or more names", bool)]
Prices = Annotated[tuple[NonNegative, ...], Range("a list of one number of 0 or more for each expert", bool)]
Widths = Annotated[tuple[Count, ...], Range("a list of one or more whole numbers of 1 or more", bool)]

Loggers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
    Range("a list of tensorboard, wandb and mlflow, each at most once", lambda value: len(set(value)) == len(value)),
]


@dataclass(frozen=True)
class EnvironmentConfig:
    """The cluster, its latency limit and the reward (simulation.md sections 2, 4 and 5)."""

    id: str  # registered environment, the scenario; keys that are None have its values
    path: str | None  # the file that azure and cluster need
    experts: Names | None
    profile: str | Names | None  # hardware profile of every expert, or one for each
    kv_cache_tokens: KVTokens | tuple[KVTokens, ...] | None  # KV cache, tokens, likewise; None: the profile's
    discipline: Discipline | None  # how every engine schedules (simulation.md section 1)
    engine: Version | None  # instead of the discipline: a version of vLLM with its defaults (simulation.md section 1c)
    max_model_len: KVTokens | None  # maximum tokens of a request, prompt and output; None: the profile's
    slots: Count | None  # requests (running and waiting) that one engine can hold
    queue_nodes: Count | Literal["all"]  # observed running, and observed waiting, requests per expert; all: every one
    episode_length: Count  # requests per episode
    latency_limit: Positive | None  # L, seconds per output token
    penalty: Penalty  # form of the action impact estimator
    penalty_weight: NonNegative  # w
    drop: bool  # whether a router may drop a request
    prefix_share: PrefixShare | None  # what is observed of prefix caches, where prompts share prefixes
    ttft_limit: Positive | None = None  # seconds; both this and the next, instead of latency_limit
    tpot_limit: Positive | None = None  # seconds per token
    token_price: Prices | None = None  # of 1,000 output tokens of each expert, in QoS
    patience: Positive | None = None  # seconds after which a client gives up
    signal_delay: NonNegative | None = None  # most seconds that a router's view of the engines is old
    features: Features | None = None  # of experts: standard, or relative to what each can serve in time
    signals: Signals | None = None  # what engines export: requests, or counts
    number: Whole | None = None  # random-cluster: which one
    num_experts: Count | None = None  # random-cluster: the most experts that it may have
    two_limits: bool | None = None  # random-cluster: limits on TTFT and TPOT instead of one on the latency per token


@dataclass(frozen=True)
class ArrivalsConfig:
    """When requests arrive."""

    kind: Literal["poisson", "trace", "piecewise"] | None  # None: the scenario's arrivals
    rate: Positive | None  # poisson: requests per second; None: the scenario's
    path: str | None  # trace: recorded requests, docs/formats.md
    rate_scale: Positive | None  # trace: 2 halves every gap; None: 1, or the scenario's
    start: NonNegative | None  # trace: seconds to skip; None: each episode starts at a random row
    durations: tuple[Positive, ...]  # piecewise: seconds of each piece
    rates: tuple[NonNegative, ...]  # piecewise: requests per second of each piece
    spread_ticks: bool = False  # trace: spread requests of equal times over their tick
    time_unit: Literal["s", "ms", "us", "ns"] | None = None  # trace: unit of its times; None: the format's
    run: Count | None = None  # trace: which of several results in the file, from 1 on


@dataclass(frozen=True)
class RequestsConfig:
    """The arriving requests: lengths and scores."""

    kind: Literal["frozen", "jsonl", "trace"]  # trace: the lengths of the arrivals' trace
    path: str | None  # jsonl: file in MixInstruct's format
    experts: Names | None  # jsonl: model names in the file, one per expert of the environment
    score: str  # jsonl: name of the score under candidates[].scores
    max_prompt_tokens: Count | None  # jsonl: longer prompts are cut to this length; None: no limit
    max_output_tokens: Count | None  # jsonl: longer answers are cut to this length; None: no limit
    true_lengths: bool  # whether predictions of output lengths are the true lengths


@dataclass(frozen=True)
class WorkloadConfig:
    """The requests of an episode: when they arrive, and what they are."""

    arrivals: ArrivalsConfig
    requests: RequestsConfig


@dataclass(frozen=True)
class NetworkConfig:
    """Shapes of the heterogeneous graph attention network and the heads on it (simulation.md section 5)."""

    kind: Literal["han", "han_jraph", "flat"]  # flat: perceptrons on one vector; of the keys below it uses mlp
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
    critics_first: Fraction


@dataclass(frozen=True)
class TrainingConfig:
    """Length, shapes and environments of training; the shapes are the fields of `learner.trainer.SACConfig`."""

    frames: Count  # decisions over all environments, without those of the start and of validation
    start_decisions: Whole  # decisions of the search for a linear policy to start from; 0: starts at random
    improvement_decisions: Whole  # decisions in which the start's best two actions are compared; 0: it is not improved
    validation_decisions: Whole  # decisions of a validation of the greedy policy; 0: the last policy is kept
    validations: Count  # number of validations during the training, evenly spread
    num_envs: Count
    buffer_capacity: Count  # transitions
    batch_size: Count
    updates_per_step: Count
    steps_per_chunk: Count  # steps of all environments between two lines of metrics
    rate_range: Span | None  # rate (poisson) or rate_scale (trace), spread over environments; None: as evaluated
    latency_limit_range: Span | None  # L, spread over the environments; None: as evaluated
    checkpoint_seconds: NonNegative  # seconds between saves of the whole state; 0: after every chunk
    checkpoints_kept: Count
    loggers: Loggers  # further destinations of the metrics beside metrics.jsonl
    seed: Seed
    start: Literal["search", "universal"] = "search"  # universal: the search begins with the package's universal router
    clusters: Count | None = None  # random-cluster: how many clusters the training environments are; None: one


@dataclass(frozen=True)
class EvaluationConfig:
    """The comparison of routers on the same fresh episodes."""

    episodes: EvaluationEpisodes
    seed: Seed
    routers: Names  # trained, and any of `routers.ROUTERS`


@dataclass(frozen=True)
class Config:
    """A whole configuration, a section for each part; `section.key` names a value."""

    environment: EnvironmentConfig
    workload: WorkloadConfig
    network: NetworkConfig
    agent: AgentConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
