"""jaxroute: an exact LLM serving cluster in JAX, the routing environment on it, and the router trained on that."""

from jaxroute.environment.registry import make

__all__ = ["make"]
__version__ = "0.1.0"
