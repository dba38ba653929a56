"""Live traffic: routers in front of real OpenAI-compatible servers (`jaxroute serve`)."""
