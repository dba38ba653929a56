"""Serving engines: exact models of vLLM's V1 and V0 schedulers and of Orca's, advanced by jumps from event to event."""
