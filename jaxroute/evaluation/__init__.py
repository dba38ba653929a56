"""Evaluation of routers on the same episodes: metrics, statistics, tables, pictures."""
