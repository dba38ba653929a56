"""Routers on the same episodes: metrics, statistics, tables, pictures."""
