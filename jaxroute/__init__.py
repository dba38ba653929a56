"""jaxroute: an exact LLM serving cluster in JAX, the routing environment on it, and the router trained on that."""

# Imported for what it does: it registers the package's own environments.
import jaxroute.environment.scenarios  # noqa: F401  # pyright: ignore[reportUnusedImport]
from jaxroute.environment.disturbances import Disturbances
from jaxroute.environment.environment import DYNAMICS_VERSION
from jaxroute.environment.registry import environments, make, register
from jaxroute.environment.wrappers import FiveValues, Wrapper
from jaxroute.routers import make_router

__all__ = [
    "DYNAMICS_VERSION",
    "FiveValues",
    "Disturbances",
    "Wrapper",
    "environments",
    "make",
    "make_router",
    "register",
]
__version__ = "0.1.0"
