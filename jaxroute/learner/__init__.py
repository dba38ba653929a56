"""Discrete soft actor-critic: replay on the device, the update, and the compiled training program."""
