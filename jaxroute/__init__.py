"""jaxroute: an exact LLM serving cluster in JAX, the routing environment on it, and the router trained on that."""

__version__ = "0.1.0"
