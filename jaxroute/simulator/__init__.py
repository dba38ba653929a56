"""Serving engines: an exact model of vLLM's V1 scheduler, advanced by jumps from event to event."""
