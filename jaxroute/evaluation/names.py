"""How routers are called in tables and pictures."""

ROUTER_LABELS = {
    "trained": "Trained",
    "round_robin": "Round-Robin",
    "shortest_queue": "Shortest Queue First",
    "bert_router": "BERT Router",
    "random": "Random",
    "least_work": "Least Work",
    "power_of_two": "Power of Two",
    "latency_based": "LiteLLM latency",
    "vllm_data_parallel": "vLLM data parallel",
    "llm_d": "llm-d",
    "routellm": "RouteLLM",
    "score_minus_load": "Score - Load",
    "lookahead": "Lookahead",
    "clairvoyant": "Clairvoyant",
}
