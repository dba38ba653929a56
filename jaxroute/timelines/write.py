"""Writes the trace, the picture and the page of an episode under one or two routers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jaxroute.environment.environment import RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError
from jaxroute.files import write_text
from jaxroute.routers.choice import Router
from jaxroute.timelines.collect import Episode, collect
from jaxroute.timelines.page import page_text
from jaxroute.timelines.perfetto import trace_text
from jaxroute.timelines.picture import timeline_picture

FILES = ("trace.json", "timeline.png", "timeline.html")


def write_timeline(
    out: str | Path,
    env: RoutingEnvironment,
    params: EnvParams,
    routers: Mapping[str, Router],
    experts: Sequence[str] = (),
    seed: int = 0,
    title: str = "",
) -> list[Episode]:
    """Writes `FILES` into the folder `out`, which it creates if necessary: an episode under one or two `routers`.

    `routers` are by label. The episode is the first of `evaluate_routers` with this seed. `experts` are names, by
    default "expert 0" and so on. Returns the data of the files: times and fates of requests, iterations, metrics.
    """
    experts = tuple(experts) or tuple(f"expert {number}" for number in range(env.num_experts))
    if not 1 <= len(routers) <= 2:
        raise UserError(f"a timeline has one or two routers, not {len(routers)}")
    if len(experts) != env.num_experts:
        raise UserError(f"the environment has {env.num_experts} experts; {len(experts)} names were given")
    episodes = collect(env, params, routers, experts, jax.random.split(jax.random.key(seed), 1)[0])
    heading = f"{title or 'Episode'}: {env.episode_length:,} requests under {' and '.join(routers)}"
    about = (
        f"{env.num_experts} experts; QoS is met below {1e3 * float(params.latency_limit):g} ms per output token; "
        f"the same requests for every router (seed {seed})"
    )
    write_episodes(Path(out), episodes, heading, about)
    return episodes


def write_episodes(out: Path, episodes: Sequence[Episode], heading: str, about: str) -> None:
    """Writes `FILES` of episodes with the same requests into `out`; `heading` and `about` are one line each."""
    out.mkdir(parents=True, exist_ok=True)
    trace = trace_text(episodes)
    write_text(out / "trace.json", trace)
    timeline_picture(out / "timeline.png", episodes)
    picture = (out / "timeline.png").read_bytes()
    write_text(out / "timeline.html", page_text(episodes, heading, about, picture, trace))
