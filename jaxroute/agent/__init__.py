"""The router that learns: graph, network, soft actor-critic."""
