"""The trainings and evaluations of each question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

RATES = (1, 2, 3, 4, 6, 8)
LIMITS_MS = (20, 30, 40, 50, 60)

PAPER = ("round_robin", "shortest_queue", "bert_router")
SERVING = (
    "random",
    "least_work",
    "power_of_two",
    "latency_based",
    "vllm_data_parallel_v0_10",
    "llm_d",
    "routellm",
    "score_minus_load",
)
PLANNING = ("lookahead", "clairvoyant")

RATE_RANGE = f"training.rate_range=[{RATES[0]}, {RATES[-1]}]"
TEXT_MODELS = ("alpaca-7b", "chatglm2-6b", "vicuna-7b")
TEXT_CLUSTER = (
    "environment.experts=[alpaca-native, chatglm-6b, koala-7B]",
    "workload.requests.kind=jsonl",
    f"workload.requests.experts=[{', '.join(TEXT_MODELS)}]",
)
"""Three models with recorded answers, each on an engine of the paper's profile."""

BASELINE_RL = ("network.kind=flat", "environment.penalty=off")


@dataclass(frozen=True)
class Training:
    """A run of `jaxroute train` with `configs/default.yaml` and these changes."""

    name: str
    overrides: tuple[str, ...]
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.name}-seed{self.seed}"


@dataclass(frozen=True)
class Setting:
    """Routers to evaluate on the same requests, at one point of a question."""

    question: str
    point: str  # value on the question's axis
    overrides: tuple[str, ...]  # changes of `configs/default.yaml`
    routers: tuple[str, ...]  # names in `jaxroute.routers.ROUTERS`
    policies: tuple[tuple[str, tuple[Training, ...]], ...]  # label -> runs, one per seed
    episodes: int
    episode_length: int

    @property
    def name(self) -> str:
        return f"{self.question}@{self.point}"


@dataclass(frozen=True)
class Question:
    """One question of the experiments."""

    title: str
    axis: str  # label of the points
    settings: tuple[Setting, ...]
    needs: tuple[str, ...] = ()  # names of recorded data for `prepare`


@dataclass(frozen=True)
class Size:
    """The size of the experiments: `--quick` or the full form."""

    main_seeds: int  # seeds of the policies trained over rates
    seeds: int  # seeds of all others
    specialists: tuple[int, ...]  # rates with a separate policy
    range_frames: int  # frames of a policy trained over a range
    frames: int  # frames of a policy trained for a single setting
    episodes: int
    episode_length: int


QUICK = Size(3, 1, (1, 3, 6), 1_200_000, 600_000, 16, 2500)
FULL = Size(5, 5, RATES, 3_000_000, 1_000_000, 20, 5000)


def questions(size: Size) -> dict[str, Question]:
    """Name -> question, in the order in which they are run."""

    def trained(name: str, *overrides: str, seeds: int = size.seeds, frames: int = size.frames) -> tuple[Training, ...]:
        changes = (*overrides, f"training.frames={frames}")
        return tuple(Training(name, changes, seed) for seed in range(seeds))

    def over_rates(name: str, *overrides: str, seeds: int = size.seeds) -> tuple[Training, ...]:
        return trained(name, RATE_RANGE, *overrides, seeds=seeds, frames=size.range_frames)

    def settings(
        question: str,
        points: Mapping[str, tuple[str, ...]],
        routers: tuple[str, ...],
        policies: Callable[[str], Mapping[str, tuple[Training, ...]]],
    ) -> tuple[Setting, ...]:
        return tuple(
            Setting(
                question, point, overrides, routers, tuple(policies(point).items()), size.episodes, size.episode_length
            )
            for point, overrides in points.items()
        )

    main = over_rates("rates-3", seeds=size.main_seeds)
    baseline = over_rates("baseline-rl-3", *BASELINE_RL, seeds=size.main_seeds)
    six = ("environment.id=paper-6",)
    main_six = over_rates("rates-6", *six)
    rate_points = {str(rate): (f"workload.arrivals.rate={rate}",) for rate in RATES}

    def at_rates(rate: str) -> dict[str, tuple[Training, ...]]:
        own = {"specialist": trained(f"rate-{rate}", f"workload.arrivals.rate={rate}")}
        return {"trained": main, "baseline_rl": baseline, **(own if int(rate) in size.specialists else {})}

    def disciplines(discipline: str) -> tuple[Setting, ...]:
        options = (f"environment.discipline={discipline}",)
        if discipline == "orca":  # it reserves this many tokens per request; requests of paper-3 have at most 512
            options = (*options, "environment.max_model_len=512")
        own = over_rates(f"rates-3-{discipline}", *options)
        points = {rate: (*overrides, *options) for rate, overrides in rate_points.items()}
        policies = {"trained": own, "trained_on_vllm_v1": main}
        return settings(discipline, points, (*PAPER, "score_minus_load", "lookahead"), lambda _: policies)

    limits = trained(
        "limits-3",
        f"training.latency_limit_range=[{LIMITS_MS[0] / 1e3}, {LIMITS_MS[-1] / 1e3}]",
        frames=size.range_frames,
    )
    limit_points = {str(limit): (f"environment.latency_limit={limit / 1e3}",) for limit in LIMITS_MS}
    expert_names = ("alpaca-native", "chatglm-6b", "mpt-7b-instruct", "koala-7B", "baize-7b", "mpt-7b")
    expert_points = {
        str(count): (f"environment.experts=[{', '.join(expert_names[:count])}]", "workload.arrivals.rate=6")
        for count in (3, 4, 5, 6)
    }

    def azure(kind: str) -> tuple[Setting, ...]:
        arrivals = ("workload.arrivals.kind=trace", f"workload.arrivals.rate_scale={{azure_{kind}_scale}}")
        first, second = ((*arrivals, f"workload.arrivals.path={{azure_{kind}_{half}}}") for half in ("first", "second"))
        policies = {"trained": main, "trained_on_trace": trained(f"azure-{kind}", *first)}
        return settings(f"azure_{kind}", {kind: second}, (*PAPER, *SERVING, *PLANNING), lambda _: policies)

    text = (*TEXT_CLUSTER, "workload.arrivals.rate={text_rate}")
    text_policies = {"trained": trained("text", *text, "workload.requests.path={text_train}")}

    def ablation(name: str, *overrides: str) -> Setting:
        policies = (("trained", trained(f"ablation-{name}", *overrides)),)
        return Setting("ablations", name, overrides, (), policies, size.episodes, size.episode_length)

    ablations = (
        ablation("default"),
        ablation("no graph network", "network.kind=flat"),
        ablation("no impact penalty", "environment.penalty=off"),
        ablation("paper's penalty", "environment.penalty=paper"),
        ablation("exact counterfactual", "environment.penalty=exact"),
        ablation("no drop action", "environment.drop=false"),
        ablation("4 heads", "network.heads=4"),
        ablation("no residual", "network.residual=false"),
        ablation("true lengths", "workload.requests.true_lengths=true"),
    )
    per_second = "requests per second"
    return {
        "rates": Question(
            "3 experts", per_second, settings("rates", rate_points, (*PAPER, *SERVING, *PLANNING), at_rates)
        ),
        "six_experts": Question(
            "6 experts",
            per_second,
            settings(
                "six_experts",
                {rate: (*overrides, *six) for rate, overrides in rate_points.items()},
                (*PAPER, "score_minus_load", *PLANNING),
                lambda _: {"trained": main_six, "trained_with_3_experts": main},
            ),
        ),
        "limits": Question(
            "3 experts, 3 requests/s",
            "latency limit (ms per token)",
            settings("limits", limit_points, (*PAPER, *PLANNING), lambda _: {"trained": limits}),
        ),
        "experts": Question(
            "6 requests/s",
            "experts",
            settings("experts", expert_points, (*PAPER, *PLANNING), lambda _: {"trained_with_3_experts": main}),
        ),
        "vllm_v0": Question("3 experts under vLLM V0", per_second, disciplines("vllm_v0")),
        "orca": Question("3 experts under Orca", per_second, disciplines("orca")),
        "azure_conv": Question("Azure conversation arrivals", "trace", azure("conv"), ("azure_conv",)),
        "azure_code": Question("Azure code arrivals", "trace", azure("code"), ("azure_code",)),
        "text": Question(
            "real prompts and answers",
            "data",
            settings(
                "text",
                {"held-out prompts": (*text, "workload.requests.path={text_holdout}")},
                (*PAPER, *SERVING, *PLANNING),
                lambda _: text_policies,
            ),
            ("text",),
        ),
        "ablations": Question("3 experts, 3 requests/s", "ablation", ablations),
    }
