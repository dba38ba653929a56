"""`jaxroute timeline ROUTER [ROUTER] --out DIR`: draws an episode under one or two routers, or a record of `serve`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxroute.agent.trainer import policy_router
from jaxroute.config.build import Experiment, build_experiment, build_network, observed_features
from jaxroute.config.loader import load_config, load_saved_config
from jaxroute.console import print_notes, report_console
from jaxroute.errors import UserError, command
from jaxroute.evaluation.tuning import tuned_routers
from jaxroute.routers import ROUTER_LABELS, ROUTERS
from jaxroute.routers.choice import Router
from jaxroute.runs.checkpoint import load_params
from jaxroute.runs.run_folder import prepare_run_folder, require_run_or_router
from jaxroute.timelines.collect import FATES, Episode, require_drawable
from jaxroute.timelines.live import live_episodes, load_record
from jaxroute.timelines.write import FILES, write_episodes, write_timeline


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Writes an episode's trace, picture and page. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxroute timeline",
        description="Write one episode under one or two routers, on the same requests, as a trace for Perfetto, a "
        "picture and a page for the browser: " + ", ".join(FILES) + ". Of the LOG.jsonl that jaxroute serve --record "
        "wrote: the live requests beside the same choices simulated.",
        epilog=f"Example: jaxroute timeline round_robin lookahead --out timeline environment.episode_length="
        f"300 workload.arrivals.rate=5. Routers: {', '.join(ROUTERS)}",
    )
    parser.add_argument("words", nargs="+", metavar="ROUTER | key=value | LOG.jsonl", help=(
        "name of a router, or folder that jaxroute train wrote; or key=value, a change of the configuration; or one "
        "file that jaxroute serve --record wrote"
    ))  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the files")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: the run's, or default.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the requests (default: evaluation.seed)")
    arguments = parser.parse_intermixed_args(argv)

    overrides = [word for word in arguments.words if "=" in word and not Path(word).is_dir()]
    names = [word for word in arguments.words if word not in overrides]
    if any(Path(name).is_file() for name in names):
        return _draw_live(arguments.words, arguments.out)
    if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
        raise UserError(f"name one router, or two that differ, not {len(names)}: {', '.join(names) or 'none'}")
    runs = [Path(name) for name in names if name not in ROUTERS]
    for run in runs:
        require_run_or_router(run)
    if arguments.seed is not None:
        overrides.append(f"evaluation.seed={arguments.seed}")
    if runs and arguments.config is None:
        config = load_saved_config(runs[0] / "config.yaml", overrides)
    else:
        config = load_config(arguments.config, overrides)
    experiment = build_experiment(config)
    require_drawable(experiment.params)
    networks = {name: _trained(experiment, Path(name)) for name in names if Path(name) in runs}
    prepare_run_folder(arguments.out)

    console = report_console()
    print_notes(console, experiment.notes)
    env, params = experiment.env, experiment.params
    routers: dict[str, Router] = {}
    rules = tuned_routers(env, params, [name for name in names if name not in networks])
    for name in names:
        if name in networks:
            routers["Trained" if len(runs) == 1 else f"Trained, {name}"] = networks[name]
        else:
            routers[ROUTER_LABELS[name]] = rules[name]
    seed, title = config.evaluation.seed, config.environment.id
    _report(arguments.out, write_timeline(arguments.out, env, params, routers, experiment.experts, seed, title))
    return 0


def _draw_live(words: Sequence[str], out: Path) -> int:
    """Draws a record of `jaxroute serve`."""
    if len(words) > 1:
        raise UserError(f"a record is drawn alone; leave out {' '.join(word for word in words if word != words[0])}")
    path = Path(words[0])
    record = load_record(path)
    prepare_run_folder(out)
    episodes = live_episodes(record)
    left_out = f", after {record.left_out:,} others" if record.left_out else ""
    heading = f"{path.name}: {len(record.arrival):,} requests{left_out}, live under {record.router} and simulated"
    about = (
        f"{len(record.experts)} experts; the simulation has the recorded times, lengths and choices, and scores are "
        "the predicted ones; QoS is met below each request's limit, by default "
        f"{1e3 * record.latency_limit:g} ms per output token"
    )
    write_episodes(out, episodes, heading, about)
    _report(out, episodes)
    return 0


def _report(out: Path, episodes: Sequence[Episode]) -> None:
    """Prints what was drawn."""
    console = report_console()
    for episode in episodes:
        counts = [f"{(episode.requests.fate == fate).sum()} {name}" for fate, name in enumerate(FATES)]
        line = f"{episode.label}: QoS {float(episode.metrics['qos']):.4f}; {', '.join(counts)}"
        console.print(line, highlight=False, markup=False)
    sizes = [f"{file} ({(out / file).stat().st_size / 1e6:.1f} MB)" for file in FILES]
    console.print(f"{', '.join(sizes)} in {out}", highlight=False, markup=False)


def _trained(experiment: Experiment, run: Path) -> Router:
    """The trained router in the folder `run`, for the environment of the episode."""
    config = load_saved_config(run / "config.yaml")
    if observed_features(config) != experiment.env.features:
        raise UserError(f"{run}: reads other features; set environment.features={observed_features(config)}")
    network = build_network(config.network)
    return policy_router(network, load_params(run, network, experiment.env, experiment.params))
