"""The paper's experiments, one entry a question: `python -m benchmarks.paper`."""
