"""The claims on the trained router and whether they are met, computed from the stored evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.paper.jobs import read_evaluation
from benchmarks.paper.plan import PAPER, SERVING, Question
from benchmarks.paper.tables import Results, interval, label_of, lead, markdown

OF_CLAIRVOYANT = {"1": 0.95, "2": 0.95, "3": 0.92, "4": 0.85}
SPECIALIST_LOSS = 0.02
LEAD_OVER_PAPER, LATENCY_CUT = 0.152, 0.218
LATENCY_RATE = "4"

Claim = tuple[str, str, str, bool | None]  # claim, target, measured, met (None: reported only)


def claims_table(out: Path, questions: dict[str, Question]) -> str:
    """A table in Markdown: each claim, its target, the measured value, and whether the claim is met."""
    rows = []
    for name, question in questions.items():
        results = {setting.point: read_evaluation(out, setting) for setting in question.settings}
        rows += _CLAIMS[name](results) if name in _CLAIMS else []
    verdicts = {True: "yes", False: "**no**", None: "-"}
    return markdown(["claim", "target", "measured", "met"], [[*row[:3], verdicts[row[3]]] for row in rows])


def _mean(results: Results, name: str) -> float:
    return interval(results[name]).mean


def _rates(by_rate: dict[str, Results]) -> Iterator[Claim]:
    ours = np.mean([_mean(results, "trained") for results in by_rate.values()])
    best = np.mean([max(_mean(results, name) for name in PAPER) for results in by_rate.values()])
    yield (
        "mean over rates, above the best paper heuristic at each",
        "+15.2 %, aim 30 %",
        f"{ours / best - 1:+.1%}",
        bool(ours >= (1 + LEAD_OVER_PAPER) * best),
    )
    flat = np.mean([_mean(results, "baseline_rl") for results in by_rate.values()])
    yield "mean over rates, above Baseline RL", "reported", f"{ours / flat - 1:+.1%} ({flat:.4f})", None
    for rate, results in by_rate.items():
        others = [name for name in (*PAPER, *SERVING, "baseline_rl") if name in results]
        other = max(others, key=lambda name: _mean(results, name))
        pair = lead(results, "trained", other)
        yield f"{rate}/s, over the best other ({label_of(other)})", "not below", _signed(pair), bool(pair.high >= 0)
    for rate, results in by_rate.items():
        pair = lead(results, "trained", "lookahead")
        yield f"{rate}/s, over Lookahead", "at least level", _signed(pair), bool(pair.high >= 0)
    for rate, share in OF_CLAIRVOYANT.items():
        reached = _mean(by_rate[rate], "trained") / _mean(by_rate[rate], "clairvoyant")
        yield f"{rate}/s, share of Clairvoyant", f"{share:.0%}", f"{reached:.1%}", bool(reached >= share)
    for rate, results in by_rate.items():
        if "specialist" in results:
            loss = 1 - _mean(results, "trained") / _mean(results, "specialist")
            target = f"at most {SPECIALIST_LOSS:.0%}"
            yield f"{rate}/s, loss to a policy for that rate", target, f"{loss:+.1%}", bool(loss <= SPECIALIST_LOSS)
    results = by_rate[LATENCY_RATE]
    for metric, what in (
        ("latency_per_token", "latency per token"),
        ("kv_use", "memory use"),
        ("qos_per_busy_second", "QoS per engine-busy second"),
    ):
        trained, other = (interval(results[name], metric).mean for name in ("trained", "round_robin"))
        change = trained / other - 1
        is_latency = metric == "latency_per_token"
        met = bool(-change >= LATENCY_CUT) if is_latency else None
        target = f"-{LATENCY_CUT:.1%}" if is_latency else "reported"
        measured = f"{change:+.1%} ({trained:.4g} against {other:.4g})"
        yield f"{LATENCY_RATE}/s, {what} against Round-Robin", target, measured, met


def _six(by_rate: dict[str, Results]) -> Iterator[Claim]:
    for rate, results in by_rate.items():
        pair = lead(results, "trained_with_3_experts", "shortest_queue")
        yield (
            f"6 experts, {rate}/s, weights of 3, over Shortest Queue First",
            "above",
            _signed(pair),
            bool(pair.low > 0),
        )


def _above_paper(policy: str, others: tuple[str, ...], where: str):
    def claims(by_point: dict[str, Results]) -> Iterator[Claim]:
        for results in by_point.values():
            for other in others:
                pair = lead(results, policy, other)
                yield f"{where}, over {label_of(other)}", "above", _signed(pair), bool(pair.low > 0)

    return claims


def _signed(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f} ± {pair[1]:.4f}"


_CLAIMS = {
    "rates": _rates,
    "six_experts": _six,
    "azure_conv": _above_paper("trained_on_trace", PAPER, "Azure conversation"),
    "text": _above_paper("trained", ("bert_router",), "real text"),
}
