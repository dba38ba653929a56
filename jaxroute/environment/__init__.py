"""The routing environment on the simulated cluster."""
