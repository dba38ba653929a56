"""Reads YAML files and `key=value` overrides into a checked `Config`, and writes it as YAML."""

from collections.abc import Iterator, Mapping, Sequence
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

Values = dict[str, Any]  # "section.key" -> value
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class _Dumper(yaml.SafeDumper):
    """Safe YAML with tuples as lists."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


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
    default = config_folder() / "default.yaml"
    values = _read(default) | (_read(path) if path is not None else {}) | _overrides(overrides)
    for key in ("environment.path", "workload.arrivals.path", "workload.requests.path"):
        if values[key] is not None:
            values[key] = str(Path(values[key]).expanduser().absolute())
    return _build(values, default)


def load_saved_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `config_text` wrote to `path`. It must have every key that has no default in the schema.

    Raises:
        UserError: as for `load_config`, or a key is missing.
    """
    return _build(_read(path) | _overrides(overrides), path)


def change_config(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """`config` with new values of some keys, {"section.key": value}. A `UserError` begins with `source`."""
    values = dotted_values(config)
    for key, value in changes.items():
        values |= _flat(_nested(key, value), source)
    try:
        return _build(values, source)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def config_text(config: Config) -> str:
    """The configuration with every key, as YAML; `load_config` reads it as an equal `Config`."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


def dotted_keys() -> list[str]:
    """Every key of the configuration as `section.key`."""
    return [key for key, _ in _kinds()]


def continuous_keys() -> set[str]:
    """The keys whose values are floats in a range. All of them are traced; most integers are static."""
    return {
        key
        for key, kind in _kinds()
        if float in (kind, *get_args(kind)) or any(float in get_args(part) for part in get_args(kind))
    }


def dotted_values(config: Config) -> dict[str, Any]:
    """Every value of the configuration by its `section.key`."""
    return {key: attrgetter(key)(config) for key in dotted_keys()}


def _kinds(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key as `section.key`, with its type."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            yield from _kinds(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _read(path: Path) -> Values:
    return _flat(read_yaml(path), str(path))


def _overrides(overrides: Sequence[str]) -> Values:
    values: Values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"command line: {override!r} is not an override; write section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise UserError(f"command line: {key}: {text!r} is not a YAML value") from None
        values |= _flat(_nested(key, value), "command line")
    return values


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _flat(tree: Any, source: str, section: Any = Config, prefix: str = "") -> Values:
    """The values of `tree` converted to the schema's types. `source` is for error messages."""
    if tree is None:  # a section with all of its keys commented out
        return {}
    if not isinstance(tree, dict):
        what = prefix.rstrip(".") or "a configuration"
        raise UserError(f"{source}: {what}: expected keys and values, got {tree!r}")
    kinds, values = get_type_hints(section, include_extras=True), {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise UserError(f"{source}: unknown key {key}; nearest: {', '.join(nearest_keys(key))}")
        if is_dataclass(kinds[name]):
            values |= _flat(value, source, kinds[name], f"{key}.")
        else:
            values[key] = check_value(value, kinds[name], f"{source}: {key}")
    return values


def check_value(value: Any, kind: Any, source: str) -> Any:
    """`value` converted to the type `kind` of a schema. A `UserError` begins with `source`."""
    converted, expected = _convert(value, kind)
    if expected:
        raise UserError(f"{source}: expected {expected}, got {'nothing' if value is None else repr(value)}")
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


def _build(values: Values, source: str | Path) -> Config:
    """The configuration with these values. Raises `UserError` if a key is missing or two contradict each other."""

    def build(section: Any, prefix: str) -> Any:
        arguments = {}
        for name, kind in get_type_hints(section).items():
            key = prefix + name
            if not is_dataclass(kind) and key not in values:
                if name in section.__dict__:  # a default: the key is younger than the file may be
                    continue
                raise UserError(f"{source}: {key}: missing; the file is cut short or of another version")
            arguments[name] = build(kind, f"{key}.") if is_dataclass(kind) else values[key]
        return section(**arguments)

    config = build(Config, "")
    _cross_check(config)
    return config


def _cross_check(config: Config) -> None:
    """Raises `UserError` if keys with valid values contradict each other."""
    arrivals, requests, training = config.workload.arrivals, config.workload.requests, config.training
    limits = config.environment.ttft_limit, config.environment.tpot_limit
    if (limits[0] is None) != (limits[1] is None):
        missing = "ttft_limit" if limits[0] is None else "tpot_limit"
        raise UserError(f"environment.{missing}: missing; limits on TTFT and TPOT apply together")
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
