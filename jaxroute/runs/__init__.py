"""What a run leaves and needs: checkpoints, states, logs, progress, devices."""
