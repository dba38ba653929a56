"""Reads YAML files and `key=value` overrides into a checked `Config`, and writes it as YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import SequenceMatcher
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from jaxroute.config.schema import Config
from jaxroute.errors import UserError, require_known
from jaxroute.files import parse_yaml, read_yaml
from jaxroute.routers import ROUTERS

Tree = dict[str, Any]
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def config_folder() -> Path:
    """The folder of jaxroute's configurations: beside the package in a clone, inside it if installed."""
    package = Path(__file__).parents[1]
    beside = package.parent / "configs"
    return beside if (beside / "default.yaml").is_file() else package / "configs"


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """`configs/default.yaml`, changed by the file at `path` and then by `overrides` ("section.key=value").

    Paths of data in the file are relative to the current directory; the result has absolute paths.

    Raises:
        UserError: a file cannot be read, a key is unknown, or a value has the wrong type or is out of range.
    """
    tree = _read(config_folder() / "default.yaml")
    if path is not None:
        tree = _merged(tree, _read(path))
    tree = _overridden(tree, overrides)
    for part in (tree["environment"], *tree["workload"].values()):
        if part["path"] is not None:
            part["path"] = str(Path(part["path"]).expanduser().absolute())
    config = _build(Config, tree, config_folder() / "default.yaml", "")
    _cross_check(config)
    return config


def load_saved_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `config_text` wrote to `path`. It must have every key; no key gets a default.

    Raises:
        UserError: as for `load_config`, or a key is missing.
    """
    config = _build(Config, _overridden(_read(path), overrides), path, "")
    _cross_check(config)
    return config


def change_config(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """`config` with new values of some keys, {"section.key": value}. A `UserError` begins with `source`."""
    tree = _check_section(_plain(asdict(config)), Config, source, "")  # lists as tuples again
    for key, value in changes.items():
        tree = _merged(tree, _check_section(_nested(key, value), Config, source, ""))
    changed = _build(Config, tree, Path(source), "")
    try:
        _cross_check(changed)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return changed


def config_text(config: Config) -> str:
    """The configuration with every key, as YAML; `load_config` reads it as an equal `Config`."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def nearest_keys(word: str, sections: bool = True) -> list[str]:
    """The one to three keys (and `sections`) of the configuration that are most similar to `word`, best first."""
    word_section, _, word_key = word.rpartition(".")

    def similarity(name: str) -> float:
        section, _, key = name.rpartition(".")
        parts = key, name.partition(".")[2]
        likeness = max(SequenceMatcher(None, word_key, part).ratio() for part in parts)
        return likeness + 0.3 * SequenceMatcher(None, word_section, section).ratio()

    names = sorted([*dotted_keys(), *(get_type_hints(Config) if sections else ())], key=similarity, reverse=True)[:3]
    return [name for name in names if similarity(name) > 0.7 * similarity(names[0])]


def dotted_keys(section: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration as `section.key`."""
    keys = []
    for name, kind in get_type_hints(section).items():
        keys += dotted_keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]
    return keys


def continuous_keys(section: Any = Config, prefix: str = "") -> set[str]:
    """The keys whose values are floats in a range. All of them are traced; most integers are static."""
    keys = set()
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            keys |= continuous_keys(kind, f"{prefix}{name}.")
        elif float in (kind, *get_args(kind)) or any(float in get_args(part) for part in get_args(kind)):
            keys.add(prefix + name)
    return keys


def dotted_values(config: Config) -> dict[str, Any]:
    """Every value of the configuration by its `section.key`."""
    return {key: attrgetter(key)(config) for key in dotted_keys()}


def _read(path: Path) -> Tree:
    return _check_section(read_yaml(path), Config, str(path), "")


def _overridden(tree: Tree, overrides: Sequence[str]) -> Tree:
    for override in overrides:
        tree = _merged(tree, _check_section(_override_tree(override), Config, "command line", ""))
    return tree


def _override_tree(override: str) -> Tree:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: {override!r} is not an override; write section.key=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"command line: {key}: {text!r} is not a YAML value") from None
    return _nested(key, value)


def _nested(key: str, value: Any) -> Tree:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merged(base: Tree, change: Tree) -> Tree:
    merged = dict(base)
    for key, value in change.items():
        merged[key] = _merged(base[key], value) if isinstance(value, dict) and key in base else value
    return merged


def _check_section(tree: Any, section: type, source: str, prefix: str) -> Tree:
    """`tree` with values converted to the schema's types. `source` and `prefix` (dotted) are for error messages."""
    if tree is None:  # a section with all of its keys commented out
        return {}
    if not isinstance(tree, dict):
        what = prefix.rstrip(".") or "a configuration"
        raise UserError(f"{source}: {what}: expected keys and values, got {tree!r}")
    kinds = get_type_hints(section, include_extras=True)
    checked = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise UserError(f"{source}: unknown key {key}; nearest: {', '.join(nearest_keys(key))}")
        if is_dataclass(kinds[name]):
            checked[name] = _check_section(value, kinds[name], source, f"{key}.")
        else:
            checked[name] = _check_value(value, kinds[name], source, key)
    return checked


def _check_value(value: Any, kind: Any, source: str, key: str) -> Any:
    converted, expected = _convert(value, kind)
    if expected:
        raise UserError(f"{source}: {key}: expected {expected}, got {'nothing' if value is None else repr(value)}")
    return converted


def _convert(value: Any, kind: Any) -> tuple[Any, str]:
    """(value converted to the type `kind`, "") or (None, what was expected)."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        converted, expected = _convert(value, arguments[0])
        return (converted, "") if not expected and arguments[1].holds(converted) else (None, arguments[1].text)
    if origin in (UnionType, Union):
        if value is None and NoneType in arguments:
            return None, ""
        attempts = [_convert(value, one) for one in arguments if one is not NoneType]
        fits = next((attempt for attempt in attempts if not attempt[1]), None)
        return fits or (None, ", or ".join(expected for _, expected in attempts))
    if origin is Literal:
        names = ", ".join(arguments)
        return (value, "") if value in arguments else (None, names if names in arguments else f"one of {names}")
    if origin is tuple:
        items = [_convert(item, arguments[0]) for item in value] if isinstance(value, list) else [(None, "")]
        wrong = next((expected for _, expected in items if expected), "") or _convert(None, arguments[0])[1]
        good = isinstance(value, list) and not any(expected for _, expected in items)
        return (tuple(item for item, _ in items), "") if good else (None, f"a list, each {wrong}")
    if isinstance(value, bool) or kind is bool:
        return (value, "") if kind is bool and isinstance(value, bool) else (None, TYPE_NAMES[kind])
    if kind is float and isinstance(value, int):
        return float(value), ""
    if kind is int and isinstance(value, float) and value.is_integer():  # frames: 1e6
        return int(value), ""
    return (value, "") if isinstance(value, kind) else (None, TYPE_NAMES[kind])


def _build(section: Any, tree: Tree, source: Path, prefix: str) -> Any:
    values = {}
    for name, kind in get_type_hints(section).items():
        if name not in tree:
            if name in section.__dict__:  # a default: the key is younger than the file may be
                continue
            raise UserError(f"{source}: {prefix}{name}: missing; the file is cut short or of another version")
        values[name] = _build(kind, tree[name], source, f"{prefix}{name}.") if is_dataclass(kind) else tree[name]
    return section(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _cross_check(config: Config) -> None:
    """Raises `UserError` if keys with valid values contradict each other."""
    arrivals, requests, training = config.workload.arrivals, config.workload.requests, config.training
    if arrivals.kind == "trace" and arrivals.path is None:
        raise UserError(
            "workload.arrivals.path: missing; add workload.arrivals.path=TRACE (a format of docs/formats.md)"
        )
    if arrivals.kind == "piecewise" and (not arrivals.rates or len(arrivals.rates) != len(arrivals.durations)):
        raise UserError("workload.arrivals.rates: expected as many as workload.arrivals.durations, at least one")
    if arrivals.kind == "piecewise" and max(arrivals.rates) == 0:
        raise UserError("workload.arrivals.rates: at least one must be above 0")
    if requests.kind == "jsonl" and requests.path is None:
        raise UserError("workload.requests.path: missing; add workload.requests.path=FILE (MixInstruct-shaped JSONL)")
    if requests.kind == "jsonl" and not requests.experts:
        raise UserError("workload.requests.experts: missing; name the file's models, one per expert")
    if requests.kind == "trace" and arrivals.kind != "trace":
        raise UserError(
            "workload.requests.kind: trace takes the lengths of the arrivals' trace; set workload.arrivals.kind=trace"
        )
    for name in config.evaluation.routers:
        require_known(name, ["trained", *ROUTERS], "router in evaluation.routers")
    if config.network.hidden % config.network.heads:
        raise UserError(f"network.hidden: expected a multiple of network.heads ({config.network.heads})")
    if training.frames < 2 * training.num_envs:
        raise UserError(
            f"training.frames={training.frames}: expected {2 * training.num_envs} or more, two steps of "
            f"training.num_envs={training.num_envs}, or nothing is learned"
        )
    if training.buffer_capacity % training.num_envs:
        raise UserError(f"training.buffer_capacity: expected a multiple of training.num_envs ({training.num_envs})")
