"""Exact models of serving engines with vLLM's V1 and V0 schedulers and Orca's, advanced by jumps between events."""
