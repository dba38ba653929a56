"""YAML files and `key=value` overrides to a checked `Config`, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import SequenceMatcher
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

import jaxroute
from jaxroute.config.schema import Config
from jaxroute.errors import UserError, known
from jaxroute.routers import ROUTERS

Tree = dict[str, Any]
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `off` is a text, not false, and `3e-4` a number, not a text."""


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def config_folder() -> Path:
    """The folder of jaxroute's own configurations: beside the package in a clone, inside it when installed."""
    package = Path(jaxroute.__file__).parent
    beside = package.parent / "configs"
    return beside if (beside / "default.yaml").is_file() else package / "configs"


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """`configs/default.yaml`, changed by the file at `path`, changed by `overrides` ("section.key=value").

    Paths of data in it are relative to the current directory, and come back absolute.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
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
    """The configuration that `config_text` wrote to `path`, with every key there: nothing falls back to a default.

    Raises:
        UserError: as `load_config`, and for a missing key.
    """
    config = _build(Config, _overridden(_read(path), overrides), path, "")
    _cross_check(config)
    return config


def change_config(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """`config` with other values of some keys, {"section.key": value}. A `UserError` begins with `source`."""
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
    """The configuration with every key, as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def nearest_keys(word: str, sections: bool = True) -> list[str]:
    """The one to three keys (and `sections`) of the configuration that are most like `word`, the most similar first."""
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
    """The keys that take any number in a range. All of them are traced; whole numbers are mostly static."""
    keys = set()
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            keys |= continuous_keys(kind, f"{prefix}{name}.")
        elif float in (kind, *get_args(kind)) or any(float in get_args(part) for part in get_args(kind)):
            keys.add(prefix + name)
    return keys


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises `UserError` for one that cannot be read, with the line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 (a subclass of SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}: line {line}: not YAML ({error.problem})") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not YAML") from None


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
        value = yaml.load(text, Loader)  # noqa: S506 (a subclass of SafeLoader)
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
    """`tree` with its values as the schema's types. `source` and `prefix` (dotted) name the place in messages."""
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
    """(value as the type `kind`, "") or (None, what was expected)."""
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
            raise UserError(f"{source}: {prefix}{name}: missing; the file is cut short or of another version")
        values[name] = _build(kind, tree[name], source, f"{prefix}{name}.") if is_dataclass(kind) else tree[name]
    return section(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _cross_check(config: Config) -> None:
    """Raises `UserError` where keys that are fine one by one do not fit together."""
    arrivals, requests, training = config.workload.arrivals, config.workload.requests, config.training
    if arrivals.kind == "trace" and arrivals.path is None:
        raise UserError(
            "workload.arrivals.path: missing; add workload.arrivals.path=TRACE (Azure CSV or Mooncake JSONL)"
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
        known(name, ["trained", *ROUTERS], "router in evaluation.routers")
    if training.warm_start is not None:
        known(training.warm_start, ROUTERS, "router in training.warm_start")
    if config.network.hidden % config.network.heads:
        raise UserError(f"network.hidden: expected a multiple of network.heads ({config.network.heads})")
    if training.frames < 2 * training.num_envs:
        raise UserError(
            f"training.frames={training.frames}: expected {2 * training.num_envs} or more, two steps of "
            f"training.num_envs={training.num_envs}, or nothing is learned"
        )
    if training.buffer_capacity % training.num_envs:
        raise UserError(f"training.buffer_capacity: expected a multiple of training.num_envs ({training.num_envs})")
