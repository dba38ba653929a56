"""Estimates an engine's latency model and unknown options from the log of a real server."""
