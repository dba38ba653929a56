"""Sweeps: the trials of a spec, programs that run a batch of trainings, and results that survive a kill."""
