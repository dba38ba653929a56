"""The known options of a server's engine, from YAML or the JSON of a recorded run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxroute.calibration.logs import ServerLog
from jaxroute.errors import UserError, require_known
from jaxroute.files import read_json, read_yaml
from jaxroute.simulator.engine_config import BLOCK_SIZE, DEFAULTS
from jaxroute.simulator.gpus import GPUS
from jaxroute.simulator.presets import with_version
from jaxroute.simulator.roofline import known_in

SEARCHED = ("num_gpu_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
"""Options that are estimated if they are not given."""

_SERVER = {
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "enable_prefix_caching": True,
    "model": None,
    "gpu": None,
    "engine": None,
}
_ALIASES = {"scheduler_reserve_full_isl": "reserve_full_isl", "device_name": "gpu"}
"""Other names of options, in vLLM's dumps."""


@dataclass(frozen=True)
class ServerOptions:
    """Options with vLLM's names; options of `SEARCHED` that are not in `engine` are unknown."""

    source: str
    engine: dict[str, Any] = field(default_factory=dict)
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    model: str | None = None
    gpu: str | None = None
    version: str | None = None  # of vLLM, with whose rules for prefix caching the engine is simulated; None: a share

    @property
    def unknown(self) -> list[str]:
        """The options of `SEARCHED` that calibration looks for."""
        return [key for key in SEARCHED if key not in self.engine]


def load_options(path: str | Path | None) -> ServerOptions:
    """Reads a YAML mapping of options, or the `*_config.json` of a recorded run, whose sections may repeat them.

    Null means unknown; without a file, all options are unknown. `engine` names a version of vLLM, whose defaults stand
    for the options that are missing. Raises `UserError`.
    """
    if path is None:
        return ServerOptions("no engine file")
    path = Path(path)
    tree = read_json(path) if path.suffix.lower() == ".json" else read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of engine options")
    if path.suffix.lower() == ".json":
        given = {}
        for key, value in _leaves(tree):
            key = _ALIASES.get(key, key)
            if value is not None and key != "engine" and (key in DEFAULTS or key in _SERVER):
                given.setdefault(key, value)
    else:
        for key in tree:
            require_known(key, [*DEFAULTS, *_SERVER], "engine option", f"{path}: ")
        given = {key: value for key, value in tree.items() if value is not None}
    given.pop("latency", None)  # always estimated
    caching = given.get("enable_prefix_caching")
    server = {key: given.pop(key, default) for key, default in _SERVER.items()}
    for key in ("data_parallel_size", "tensor_parallel_size"):
        if isinstance(server[key], bool) or not isinstance(server[key], int) or not 1 <= server[key] <= 64:
            raise UserError(f"{path}: {key} must be a whole number from 1 to 64, not {server[key]!r}")
    for key, kind, what in (
        ("enable_prefix_caching", bool, "true or false"),
        ("model", str, "a name"),
        ("gpu", str, "a name"),
        ("engine", str, "a version, such as vllm-0.19"),
    ):
        if server[key] is not None and not isinstance(server[key], kind):
            raise UserError(f"{path}: {key} must be {what}, not {server[key]!r}")
    version = server.pop("engine")
    if version is not None:
        gpu = known_in(server["gpu"], GPUS)
        own = {**given, "engine": version, **({} if gpu is None else {"gpu": gpu})}
        own |= {} if caching is None else {"enable_prefix_caching": caching}
        unknown = [
            key for key, value in tree.items() if value is None
        ]  # null: not known, whatever the version's default
        given = {key: value for key, value in with_version(own, str(path)).items() if key not in unknown}
    return ServerOptions(str(path), given, **server, version=version)


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values; those of a section come before those of its subsections."""
    for key, value in tree.items():
        if not isinstance(value, dict):
            yield key, value
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)


def check_fits(log: ServerLog, options: ServerOptions) -> None:
    """Raises `UserError` if the given engine could never have served a request of the log."""
    engine = options.engine
    longest = engine.get("max_model_len")
    blocks, size = engine.get("num_gpu_blocks"), engine.get("block_size", BLOCK_SIZE)
    budget = engine.get("max_num_batched_tokens")
    for position in range(len(log)):
        prompt, output = int(log.prompt_tokens[position]), int(log.output_tokens[position])
        what = f"{options.source}: cannot hold request {log.ids[position]} of {log.path}, {prompt} + {output} tokens: "
        if longest is not None and prompt + output > longest:
            raise UserError(f"{what}max_model_len is {longest}; correct it, or set it to null")
        if blocks is not None and -(-(prompt + output - 1) // size) > blocks - 1:
            raise UserError(
                f"{what}num_gpu_blocks is {blocks} of {size} tokens, one not usable; correct it, or set it to null"
            )
        if budget is not None and not engine.get("enable_chunked_prefill", True) and prompt > budget:
            raise UserError(f"{what}max_num_batched_tokens is {budget} and prefill is not chunked; correct it")
