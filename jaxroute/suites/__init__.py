"""Suites of environments on which routers are compared: frozen descriptions, their results, tables and pictures."""
