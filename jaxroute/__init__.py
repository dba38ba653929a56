"""jaxroute: an exact simulator of LLM serving clusters in JAX, a routing environment on it, and a trained router."""

# The import registers the environments of the package.
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
