"""Draws an episode: experts as lanes, requests as bars coloured by their fate, and the queue below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxroute.drawing import INK, OTHER_COLOUR, TRAINED_COLOUR, picture
from jaxroute.timelines.collect import DROPPED, MET, MISSED, REJECTED, Disturbed, Episode
from jaxroute.timelines.layout import queues, rows

MISSED_COLOUR, REJECTED_COLOUR, DISTURBED_COLOUR = "#d9622b", "#8a3fa0", "#e0a800"
RUNNING_COLOUR, WAITING_COLOUR = OTHER_COLOUR, "#e0a800"
FATE_COLOURS = {MET: TRAINED_COLOUR, MISSED: MISSED_COLOUR, DROPPED: INK, REJECTED: REJECTED_COLOUR}
_LEGEND = {MET: "QoS met", MISSED: "QoS missed", DROPPED: "dropped by the router", REJECTED: "rejected by the expert"}
_PALE = 0.45
"""Opacity of a bar before its first token."""


def timeline_picture(path: Path, episodes: Sequence[Episode]) -> None:
    """Writes a PNG with a column for each episode (one or two, with the same requests), on equal scales."""
    experts = episodes[0].experts
    end = max(episode.end for episode in episodes)
    packed = [[rows(episode.requests, expert) for expert in range(len(experts))] for episode in episodes]
    tallest = max(max(int(row.max(initial=0)) for row in lanes) for lanes in packed) + 1
    times = np.linspace(0, end, 1500)
    counts = [queues(episode, times) for episode in episodes]
    longest = max(int(np.sum(pair, axis=(0, 1)).max()) for pair in counts)
    turned_away = any((episode.requests.fate >= DROPPED).any() for episode in episodes)
    heights = [0.22] * turned_away + [1.0] * len(experts) + [1.1]
    size = 12 if len(episodes) > 1 else 8, 0.9 + 1.05 * sum(heights)
    with picture(path, *size, dpi=130, pil_kwargs={"optimize": True}) as figure:
        figure.get_layout_engine().set(h_pad=0.03, hspace=0.02, wspace=0.03)  # pyright: ignore
        panels = figure.subplots(
            len(heights), len(episodes), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes in panels.flat:
            axes.grid(False)
        for column, (episode, lanes, pair) in enumerate(zip(episodes, packed, counts, strict=True)):
            axes = list(panels[:, column])
            axes[0].set_title(f"{episode.label}: QoS {float(episode.metrics['qos']):.3f}", fontsize=13, pad=16)
            if turned_away:
                _draw_turned_away(axes.pop(0), episode)
            for expert, name in enumerate(experts):
                _draw_lane(axes[expert], episode, lanes[expert], tallest)
                axes[expert].annotate(name, (0, 1.02), xycoords="axes fraction", va="bottom", fontsize=9)
                _draw_disturbed(axes[expert], [part for part in episode.disturbed if part.expert == expert])
            _draw_queue(axes[-1], times, *pair, 1.08 * longest)
            axes[-1].set(xlabel="seconds", xlim=(0, end))
            if column:
                for one in axes:
                    one.tick_params(labelleft=False)
            else:
                axes[-1].set_ylabel("in the cluster", fontsize=9)
                axes[len(experts) // 2].set_ylabel("requests", fontsize=9)
        seen = set(np.concatenate([episode.requests.fate for episode in episodes]).tolist())
        handles = [Patch(color=FATE_COLOURS[fate], label=label) for fate, label in _LEGEND.items() if fate in seen]
        pale = to_rgba(TRAINED_COLOUR, _PALE)
        handles.append(Patch(color=pale, linewidth=0, label="paler: before the first token"))
        handles.append(Patch(color=RUNNING_COLOUR, label="running"))
        if any(pair[1].any() for pair in counts):
            handles.append(Patch(color=WAITING_COLOUR, label="waiting"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


def _draw_lane(axes: Axes, episode: Episode, row: np.ndarray, tallest: int) -> None:
    requests = episode.requests
    for begin, end, opacity in (
        (requests.arrival, requests.first_token, _PALE),
        (requests.first_token, requests.finish, 1.0),
    ):
        for fate in (MET, MISSED):
            mine = (row >= 0) & (requests.fate == fate)
            left, right, low = begin[mine], end[mine], row[mine] + 0.08
            corners = [(left, low), (right, low), (right, low + 0.84), (left, low + 0.84)]
            bars = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
            colour = to_rgba(FATE_COLOURS[fate], opacity)
            axes.add_collection(PolyCollection(list(bars), facecolors=[colour], linewidths=0), autolim=False)
    axes.set_ylim(0, tallest)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(axis="x", length=0)


def _draw_disturbed(axes: Axes, disturbed: Sequence[Disturbed]) -> None:
    for part in disturbed:
        axes.axvspan(part.start, part.end, color=DISTURBED_COLOUR, alpha=0.25, linewidth=0, zorder=0)
        middle = (part.start + part.end) / 2
        axes.annotate(
            part.label, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9
        )


def _draw_turned_away(axes: Axes, episode: Episode) -> None:
    """Draws a tick for each request that was dropped (above) or rejected (below)."""
    requests = episode.requests
    for fate, low in ((DROPPED, 0.5), (REJECTED, 0.0)):
        when = requests.arrival[requests.fate == fate]
        ticks = [((time, low), (time, low + 0.5)) for time in when]
        axes.add_collection(LineCollection(ticks, colors=[FATE_COLOURS[fate]], linewidths=0.8), autolim=False)
    axes.set(ylim=(0, 1), yticks=[])
    axes.tick_params(axis="x", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.annotate("turned away", (0, 1.02), xycoords="axes fraction", va="bottom", fontsize=9)


def _draw_queue(axes: Axes, times: np.ndarray, running: np.ndarray, waiting: np.ndarray, top: float) -> None:
    run, wait = running.sum(0), waiting.sum(0)
    axes.fill_between(times, run, step="post", color=RUNNING_COLOUR, linewidth=0)
    axes.fill_between(times, run, run + wait, step="post", color=WAITING_COLOUR, linewidth=0)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
