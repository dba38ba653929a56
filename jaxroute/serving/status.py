"""The status page: one HTML file that asks for /status.json."""

from pathlib import Path
from typing import Any

from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.statistics import PERIOD

PAGE = Path(__file__).with_name("status.html").read_text(encoding="utf-8")


def status(dispatcher: Dispatcher, draining: bool) -> dict[str, Any]:
    """What the page shows; no text of any request is in it."""
    facts, statistics = dispatcher.ledger.facts(dispatcher.clock()), dispatcher.statistics
    experts = []
    for number, expert in enumerate(dispatcher.cluster.experts):
        count = int(facts.count[number])
        experts.append(
            {
                "name": expert.name,
                "up": bool(dispatcher.up[number]),
                "open": count,
                "streaming": int((facts.generated[number, :count] > 0).sum()),
                "recent_ms_per_token": round(1000 * float(facts.recent_latency[number]), 2),
                **{key: statistics.totals[expert.name][key] for key in ("completed", "met", "failed", "cancelled")},
            }
        )
    return {
        "model": dispatcher.cluster.model,
        "slots": dispatcher.ledger.slots,
        "draining": draining,
        "period": PERIOD,
        "experts": experts,
        "drops": dict(statistics.reasons),
        "bars": statistics.bars(),
    }
