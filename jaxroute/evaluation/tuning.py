"""Tunes the parameters of routers to an environment: CMA-ES on episodes that no evaluation uses, kept on disk."""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.cma_es import ALL, EACH, Search, devices_for, over_devices
from jaxroute.environment.environment import DYNAMICS_VERSION, RoutingEnvironment
from jaxroute.environment.state import EnvParams
from jaxroute.errors import UserError, require_known
from jaxroute.evaluation.episodes import for_search, run_episodes
from jaxroute.files import cache_folder, write_text
from jaxroute.routers import ROUTERS, Parameters, make_router
from jaxroute.routers.choice import Router

DECISIONS = 400_000
"""Simulated decisions for each router: as many as `training.frames` of `configs/default.yaml`."""

_KEY = 0x74756E65  # no evaluation's keys come from it
_LENGTH = 1000  # requests of an episode, or fewer if the environment's episodes are shorter
_POPULATION = 16  # settings that are simulated at once, an episode each
_WIDE, _FINAL = 2, 2  # generations before CMA-ES, all over the ranges, and after it, for the finalists
_LAST = 3  # generations of CMA-ES whose best settings are finalists
_FINALISTS = 8
_SCALE = 0.2  # standard deviation of the first generation of CMA-ES, as a share of each range


class Tuning(NamedTuple):
    """The result for one router."""

    parameters: Parameters  # for `make_router`; empty if the router has nothing to tune
    qos: float | None  # its mean QoS on the episodes that chose it among the finalists
    decisions: int  # simulated
    seconds: float  # of the search, compilation included, when it was made
    kept: bool = False  # whether it was read from disk


def tune_routers(
    env: RoutingEnvironment,
    params: EnvParams,
    names: Sequence[str],
    *,
    decisions: int = DECISIONS,
    seed: int = 0,
    keep: bool = True,
    done: Callable[[str, Tuning], None] = lambda name, tuning: None,
) -> dict[str, Tuning]:
    """Router name -> its parameters with the highest mean QoS per arrival in this environment.

    Each router has `decisions` simulated decisions, in whole episodes from an empty cluster as in an evaluation, of at
    most 1000 requests. Settings spread over the ranges in `ROUTERS` come first, then CMA-ES around the best of them, on
    new episodes in each generation. At last its mean and the best settings are compared on the same further episodes,
    so that no setting is chosen for lucky requests. All keys differ from those of every evaluation.

    All names are one program: another rate, limit or seed needs no compilation. With `keep` results are read from the
    user's cache folder, if it has this environment, router, budget and seed, and written there. `done` is called with
    each result.

    Raises:
        UserError: a name is unknown, or `decisions` is below 1.
    """
    for name in names:
        require_known(name, ROUTERS, "router")
    if decisions < 1:
        raise UserError(f"decisions must be a whole number of 1 or more, not {decisions!r}")
    least = _POPULATION * (_WIDE + _LAST + _FINAL)
    env, params = for_search(env, params, max(1, min(_LENGTH, decisions // least)))
    found: dict[str, Tuning] = {}
    paths = {name: _path(env, params, name, decisions, seed) if keep else None for name in names}
    for name, path in paths.items():
        if not _tunable(name, env):
            found[name] = Tuning({}, None, 0, 0.0)
        elif (old := _read(path)) is not None:
            found[name] = old
    missing = tuple(name for name in paths if name not in found)
    for name in paths:
        if name not in found:
            found[name] = _tune(name, missing, env, params, decisions, seed)
            _write(paths[name], found[name])
        done(name, found[name])
    return {name: found[name] for name in paths}


def tuned_routers(
    env: RoutingEnvironment,
    params: EnvParams,
    names: Sequence[str],
    *,
    trained: Router | None = None,
    decisions: int = DECISIONS,
    done: Callable[[str, Tuning], None] = lambda name, tuning: None,
) -> dict[str, Router]:
    """The routers of these names with their best parameters (`tune_routers`), "trained" among them if it is given.

    A router that follows another one in its simulations follows `trained`, or without it a tuned rule.
    """
    rules = [name for name in names if name != "trained"]
    followed = {name: rule for name in rules if (rule := ROUTERS[name].follows)}
    to_tune = dict.fromkeys([*rules, *(() if trained else followed.values())])
    tunings = tune_routers(env, params, list(to_tune), decisions=decisions, done=done)
    routers: dict[str, Any] = {"trained": trained}
    for name in to_tune:
        if name not in followed:
            routers[name] = make_router(name, env, **tunings[name].parameters)
    for name, rule in followed.items():
        routers[name] = make_router(name, env, policy=trained or routers[rule])
    return {name: routers[name] for name in names}


def _tunable(name: str, env: RoutingEnvironment) -> bool:
    spec = ROUTERS[name]
    return bool(spec.ranges) or len(spec.choices(env.num_experts)) > 1


def _tune(
    name: str, names: tuple[str, ...], env: RoutingEnvironment, params: EnvParams, decisions: int, seed: int
) -> Tuning:
    """The best setting of the router `name`, one of the `names` that share a program."""
    started = time.monotonic()
    spec = ROUTERS[name]
    choices, dims = spec.choices(env.num_experts), len(spec.ranges)
    length = env.episode_length
    generations = max(decisions // (_POPULATION * length), _WIDE + _LAST + _FINAL) - _WIDE - _FINAL
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _KEY), generations + 2)
    devices = devices_for(_POPULATION)

    def qos(settings: list[Parameters], keys: jax.Array) -> np.ndarray:
        """float64 [settings]: QoS of one episode of each; `settings` are any multiple of a generation."""
        parts = []
        for begin in range(0, len(settings), _POPULATION):
            part = slice(begin, begin + _POPULATION)
            columns = {other: _columns([_middle(other, env)] * _POPULATION) for other in names}
            columns[name] = _columns(settings[part])
            which = jnp.int32(names.index(name))
            parts.append(_program(names, env, devices, which, columns, keys[part], params))
        return np.concatenate(jax.device_get(parts)).astype(np.float64)

    def setting(point: np.ndarray, choice: Parameters) -> Parameters:
        return {**_setting(name, point), **choice}

    def same(key: jax.Array, count: int) -> jax.Array:
        return jnp.broadcast_to(key, (count,))

    random = np.random.default_rng(seed)
    wide = _spread(random, _WIDE * _POPULATION, dims)
    settings = [setting(point, choices[index % len(choices)]) for index, point in enumerate(wide)]
    best = int(qos(settings, same(keys[0], len(wide))).argmax())
    finalists, choice = [settings[best]], choices[best % len(choices)]
    if dims:
        search = Search(wide[best], np.full(dims, _SCALE), _POPULATION, seed)
        for generation in range(generations):
            points = search.ask()
            settings = [setting(point, choice) for point in points]
            values = qos(settings, same(keys[1 + generation], _POPULATION))
            outside = np.sum((points - np.clip(points, 0, 1)) ** 2, axis=1)
            search.tell(outside - values)
            if generation >= generations - _LAST:
                finalists += [settings[index] for index in values.argsort()[-2:]]
        finalists.append(setting(search.mean, choice))
    finalists = (finalists * _FINALISTS)[:_FINALISTS]
    lanes = _FINAL * _POPULATION
    episodes = jnp.repeat(jax.random.split(keys[-1], lanes // _FINALISTS), _FINALISTS)
    values = qos(finalists * (lanes // _FINALISTS), episodes).reshape(-1, _FINALISTS).mean(0)
    simulated = (_WIDE + _FINAL + (generations if dims else 0)) * _POPULATION * length
    winner = int(values.argmax())
    return Tuning(finalists[winner], float(values[winner]), simulated, round(time.monotonic() - started, 1))


def _spread(random: np.random.Generator, count: int, dims: int) -> np.ndarray:
    """A Latin hypercube, float64 [count, dims]: each coordinate has one point in each of `count` equal intervals.

    The best settings may be a narrow peak of one parameter, which independent points miss.
    """
    order = np.tile(np.arange(count)[:, None], (1, dims))
    return (random.permuted(order, axis=0) + random.random((count, dims))) / count


def _setting(name: str, point: np.ndarray) -> Parameters:
    """The parameters at a point of the unit cube, float [P]; points outside are moved to its surface."""
    values = {}
    for share, (parameter, (low, high, log)) in zip(np.clip(point, 0, 1), ROUTERS[name].ranges.items(), strict=True):
        value = low * (high / low) ** share if log else low + (high - low) * share
        values[parameter] = float(np.float32(value))
    return values


def _middle(name: str, env: RoutingEnvironment) -> Parameters:
    spec = ROUTERS[name]
    return {**_setting(name, np.full(len(spec.ranges), 0.5)), **spec.choices(env.num_experts)[0]}


def _columns(settings: Sequence[Parameters]) -> dict[str, np.ndarray]:
    return {
        key: np.asarray([setting[key] for setting in settings], np.int32 if isinstance(value, int) else np.float32)
        for key, value in settings[0].items()
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _program(
    names: tuple[str, ...],
    env: RoutingEnvironment,
    devices: int,
    which: jax.Array,
    columns: dict[str, dict[str, jax.Array]],
    keys: jax.Array,
    params: EnvParams,
) -> jax.Array:
    """QoS, float [K], of one episode per key [K] under the router number `which` (int32 []), with `columns` [K]."""

    def one(which: jax.Array, columns: dict[str, dict[str, jax.Array]], key: jax.Array, params: EnvParams) -> jax.Array:
        routers = [make_router(name, env, **columns[name]) for name in names]
        return run_episodes(env, routers, which, key[None], params)["qos"][0]

    run = jax.vmap(one, (None, 0, 0, None))
    run = over_devices(run, devices, inputs=(ALL, EACH, EACH, ALL), outputs=EACH)
    return run(which, columns, keys, params)


def _path(env: RoutingEnvironment, params: EnvParams, name: str, decisions: int, seed: int) -> Path | None:
    """The file of a result, whose name depends on all that it depends on; None without a writable folder."""
    folder = cache_folder("tuned")
    if folder is None:
        return None
    leaves, structure = jax.tree.flatten(params)
    spec = ROUTERS[name]
    text = (DYNAMICS_VERSION, env, structure, name, inspect.getsource(spec.rule), spec.ranges, decisions, seed)
    digest = hashlib.sha256(repr(text).encode())
    for leaf in map(np.asarray, leaves):
        digest.update(f"{leaf.shape}{leaf.dtype}".encode() + leaf.tobytes())
    return folder / f"{name}-{digest.hexdigest()[:24]}.json"


def _read(path: Path | None) -> Tuning | None:
    """The result in a file, or None if it has none."""
    try:
        return None if path is None else Tuning(**json.loads(path.read_text(encoding="utf-8")), kept=True)
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path | None, tuning: Tuning) -> None:
    if path is not None:
        values = tuning._asdict()
        del values["kept"]
        write_text(path, json.dumps(values) + "\n")
