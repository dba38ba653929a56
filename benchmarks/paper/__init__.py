"""The paper's experiments, one entry per question: `python -m benchmarks.paper`."""
