"""Many trainings at once: trials of a spec, programs that run a batch of them, results that survive a kill."""
