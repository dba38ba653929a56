"""How routers are called in tables and pictures."""

ROUTER_LABELS = {
    "trained": "Trained",
    "round-robin": "Round-Robin",
    "shortest-queue": "Shortest Queue First",
    "bert-router": "BERT Router",
    "random": "Random",
}
