"""Profiles as YAML files: those of the package and of users; and roofline guesses.

A file has the engine's options under `engine`, in the format of `jaxroute replay`; there, `engine` may name a version
of vLLM, whose defaults the others override, and `gpu` its GPU. The file's other keys state their source.
`jaxroute calibrate` writes such files.
"""

from pathlib import Path
from typing import Any

from jaxroute.errors import UserError, require_known
from jaxroute.files import read_yaml
from jaxroute.simulator.engine_config import DEFAULTS, engine_from_config
from jaxroute.simulator.presets import with_version
from jaxroute.simulator.roofline import roofline_by_name

FOLDER = Path(__file__).with_name("measured")
GUESS = "roofline:"
"""`roofline:GPU:MODEL` names a guess instead of a file."""

KEYS = ("name", "guess", "engine", "data_parallel_size", "request_overhead", "source", "fit", "load")


def shipped() -> list[str]:
    """Names of the profiles of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_path_or_guess(name: str) -> bool:
    """Whether a profile is named by a YAML file or as a guess, not as one that comes with the package."""
    return name.lower().endswith((".yaml", ".yml")) or name.startswith(GUESS)


def load_profile(name: str | Path) -> dict[str, Any]:
    """The profile of a name, a path of a YAML file or `roofline:GPU:MODEL`, as a checked mapping with `KEYS`.

    Raises `UserError`.
    """
    name = str(name)
    if name.startswith(GUESS):
        parts = name.split(":")
        if len(parts) != 3:
            raise UserError(f"profile {name}: a guess is named roofline:GPU:MODEL, such as roofline:l40s:qwen2.5-7b")
        return {"name": name, "guess": True, "engine": {**DEFAULTS, **roofline_by_name(parts[1], parts[2])}}
    path = Path(name) if is_path_or_guess(name) else FOLDER / f"{require_known(name, shipped(), 'profile')}.yaml"
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("engine"), dict):
        raise UserError(f"{path}: key engine: a mapping of engine options is missing")
    for key in tree:
        require_known(key, KEYS, "key", f"{path}: ")
    if "latency" not in tree["engine"] or "num_gpu_blocks" not in tree["engine"]:
        raise UserError(f"{path}: engine: needs latency and num_gpu_blocks")
    options = with_version(tree["engine"], f"{path}: engine")
    engine_from_config(options, f"{path}: engine")
    tree["engine"] = {**DEFAULTS, **options}
    return tree
