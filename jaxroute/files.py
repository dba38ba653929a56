"""Reads YAML and JSON files, with one-line errors, and writes files atomically: completely or not at all."""

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from jaxroute.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `off` is a string instead of false, and `3e-4` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The content of a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # noqa: S506 (a subclass of SafeLoader)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises `UserError`, with the line, if it cannot be read."""
    try:
        return parse_yaml(_text(path, "YAML"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}: line {line}: not YAML ({error.problem}); correct it") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not YAML; give the path of a YAML file") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError`, with the line, if it cannot be read."""
    try:
        return json.loads(_text(path, "JSON"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}: not JSON ({error.msg}); correct it, or give a file of the right kind"
        ) from None


def _text(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a {kind} file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the path of a {kind} file") from None


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Yields a temporary path beside `path` to write to. It is renamed to `path` at the end, or removed on failure."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder(name: str = "") -> Path | None:
    """The folder `name` in the user's cache folder of this package, created; None if it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxroute" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
