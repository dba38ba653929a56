"""jaxroute: an exact simulator of LLM serving clusters in JAX, a routing environment on it, and a trained router."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# The import registers the environments of the package.
import jaxroute.environment.scenarios  # noqa: F401  # pyright: ignore[reportUnusedImport]
from jaxroute.config.loader import load_config
from jaxroute.environment.disturbances import Disturbances
from jaxroute.environment.environment import DYNAMICS_VERSION, RoutingEnvironment
from jaxroute.environment.impact import predicted_engine
from jaxroute.environment.observation import ARRIVED_FEATURES, EXPERT_FEATURES, REQUEST_FEATURES, GraphObservation
from jaxroute.environment.registry import environments, make, register
from jaxroute.environment.state import EnvParams, EnvState
from jaxroute.environment.wrappers import FiveValues, Wrapper
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_routers
from jaxroute.routers import make_router
from jaxroute.routers.choice import Router
from jaxroute.runs.compilation_cache import keep_compiled_programs
from jaxroute.testing import check_env

if TYPE_CHECKING:
    from jaxroute.agent.router_network import ActorCritic
    from jaxroute.agent.trainer import make_trainer, policy_router
    from jaxroute.config.build import build_experiment
    from jaxroute.suites.description import suite
    from jaxroute.sweeps.driver import train_trials
    from jaxroute.timelines.write import write_timeline

__all__ = [
    "ARRIVED_FEATURES",
    "DYNAMICS_VERSION",
    "EXPERT_FEATURES",
    "REQUEST_FEATURES",
    "ActorCritic",
    "Disturbances",
    "EnvParams",
    "EnvState",
    "FiveValues",
    "GraphObservation",
    "Router",
    "RoutingEnvironment",
    "UserError",
    "Wrapper",
    "build_experiment",
    "check_env",
    "environments",
    "evaluate_routers",
    "keep_compiled_programs",
    "load_config",
    "make",
    "make_router",
    "make_trainer",
    "policy_router",
    "predicted_engine",
    "register",
    "suite",
    "train_trials",
    "write_timeline",
]
__version__ = version("jaxroute")

# Imported when they are first asked for: optimizers, checkpoints and pictures take longer to import than all the rest.
_IMPORTED_LATER = {
    "ActorCritic": "jaxroute.agent.router_network",
    "build_experiment": "jaxroute.config.build",
    "make_trainer": "jaxroute.agent.trainer",
    "policy_router": "jaxroute.agent.trainer",
    "suite": "jaxroute.suites.description",
    "train_trials": "jaxroute.sweeps.driver",
    "write_timeline": "jaxroute.timelines.write",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module 'jaxroute' has no attribute '{name}'")
    globals()[name] = getattr(importlib.import_module(_IMPORTED_LATER[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
