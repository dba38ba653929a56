"""Writes an episode as one self-contained HTML page: lanes with a scrubber, metrics, picture and trace."""

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.drawing import INK
from jaxroute.evaluation.tables import ROWS
from jaxroute.timelines.collect import FATES, Episode, Requests
from jaxroute.timelines.layout import iteration_kind, merged, of_expert, rows
from jaxroute.timelines.picture import DISTURBED_COLOUR, FATE_COLOURS, RUNNING_COLOUR, WAITING_COLOUR
from jaxroute.timelines.record import Pieces

_TEMPLATE = Path(__file__).with_name("page.html")
_KINDS = ("empty", "decode", "prefill", "mixed")  # the order of the template
_UNIT = 1e4  # units per second, so that integers are enough
_TIMES = ("arrival", "admitted", "first_token", "finish", "start", "end")
_OF_REQUESTS = (*_TIMES[:4], "expert", "fate", "prompt_tokens", "output_tokens", "preemptions")
_OF_PIECES = (*_TIMES[4:], "iterations", "prefill_tokens", "decodes", "running", "waiting")


def page_text(episodes: Sequence[Episode], title: str, about: str, picture: bytes, trace: str) -> str:
    """The page of one or two episodes with the same requests.

    `title` and `about` are one line each, `picture` is the PNG, and `trace` the text of trace.json, which the page can
    save.
    """
    parts = {
        "title": html.escape(title),
        "about": html.escape(about),
        "table": _table(episodes),
        "picture": base64.b64encode(picture).decode(),
        "trace": base64.b64encode(gzip.compress(trace.encode(), mtime=0)).decode(),
        "data": json.dumps(_data(episodes), separators=(",", ":")).replace("</", "<\\/"),
    }
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], _TEMPLATE.read_text(encoding="utf-8"))


def _table(episodes: Sequence[Episode]) -> str:
    head = "".join(f"<th>{html.escape(episode.label)}</th>" for episode in episodes)
    lines = [f"<table><thead><tr><th></th>{head}</tr></thead><tbody>"]
    for label, metric, factor, decimals in (("QoS per request", "qos", 1, 4), *ROWS):
        values = [float(episode.metrics[metric]) * factor for episode in episodes]
        cells = "".join(f"<td>{value:.{decimals}f}</td>" if np.isfinite(value) else "<td>-</td>" for value in values)
        lines.append(f"<tr><th>{label.replace('  ', '&emsp;')}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _data(episodes: Sequence[Episode]) -> dict[str, Any]:
    first = episodes[0]
    return {
        "experts": first.experts,
        "end": int(np.ceil(_UNIT * max(episode.end for episode in episodes))),
        "limit_ms": round(1e3 * first.latency_limit, 3),
        "fates": FATES,
        "colours": [FATE_COLOURS[fate] for fate in range(len(FATES))],
        "ink": INK,
        "running": RUNNING_COLOUR,
        "waiting": WAITING_COLOUR,
        "disturbed": DISTURBED_COLOUR,
        "episodes": [_episode(episode) for episode in episodes],
    }


def _episode(episode: Episode) -> dict[str, Any]:
    requests, experts = episode.requests, range(len(episode.experts))
    return {
        "label": episode.label,
        "qos": float(episode.metrics["qos"]),
        **_columns(requests, _OF_REQUESTS),
        "row": np.max([rows(requests, expert) for expert in experts], axis=0).tolist(),
        "score": [round(score, 3) for score in requests.score.tolist()],
        "disturbed": [
            {"expert": part.expert, "span": _times(np.array([part.start, part.end])), "label": part.label}
            for part in episode.disturbed
        ],
        "pieces": [
            _pieces(merged(of_expert(episode.pieces, expert)), int(episode.usable_blocks[expert])) for expert in experts
        ],
    }


def _pieces(pieces: Pieces, usable_blocks: int) -> dict[str, Any]:
    kinds = map(iteration_kind, pieces.prefill_tokens.tolist(), pieces.decodes.tolist())
    return {
        **_columns(pieces, _OF_PIECES),
        "kind": [_KINDS.index(kind) for kind in kinds],
        "kv": np.rint(100 * pieces.blocks / usable_blocks).astype(int).tolist(),
    }


def _columns(table: Requests | Pieces, names: Sequence[str]) -> dict[str, list[int]]:
    fields = {name: getattr(table, name) for name in names}
    return {name: _times(field) if name in _TIMES else field.tolist() for name, field in fields.items()}


def _times(seconds: np.ndarray) -> list[int]:
    """Times in integer units; -1 for events that did not happen."""
    return np.where(np.isfinite(seconds), np.rint(_UNIT * np.nan_to_num(seconds)), -1).astype(int).tolist()
