"""Heterogeneous graph attention network (Wang et al., 2019) on the routing graph: one set of weights, two equal paths.

A layer is that of PyTorch Geometric's HANConv (simulation.md section 5). Every node type is projected. For each edge
type, a node attends over its neighbours (several heads, LeakyReLU 0.2, softmax, ReLU after the sum, zeros without
neighbours). Semantic attention then mixes the edge types that reach a node. `residual` adds the node's own projection.
Without it, an expert's own features affect the arrived node after two layers only through attention weights
(deviations.md); `residual=False` is the paper's network.

The dense path (`HAN.__call__`, `HAN.states`; `han_dense.py`) works on arrays with masks. The jraph path
(`HAN.on_graph`, `HAN.embed_by_graph`; `han_graph.py`) works on a batched `jraph.GraphsTuple` without empty queue
slots. Tests check that both give the same results; benchmarks/results.md says when each is faster.
"""

import flax.linen as nn
import jax

from jaxroute.agent.graph import GraphsTuple
from jaxroute.agent.han_dense import NodeStates, dense_layer
from jaxroute.agent.han_graph import embed_in_parts, graph_layers
from jaxroute.agent.han_weights import HANLayer, LayerWeights
from jaxroute.agent.node_types import NODE_TYPES, feature_widths
from jaxroute.environment.observation import RoutingGraph


class HAN(nn.Module):
    """A stack of layers. `hidden` must be a multiple of `heads`."""

    hidden: int = 64
    heads: int = 8
    layers: int = 2
    residual: bool = True

    def setup(self):
        """The weights of each layer."""
        self.stack = [HANLayer(self.hidden, self.heads) for _ in range(self.layers)]

    def __call__(self, obs: RoutingGraph) -> dict[str, jax.Array]:
        """The embeddings by node type, float32: arrived [..., hidden], expert [..., N, hidden], running and waiting
        [..., N, K, hidden]; masked slots have zeros.
        """
        return self.states(obs)[-1].by_node(obs.arrived.shape[:-1])

    def states(self, obs: RoutingGraph) -> list[NodeStates]:
        """The raw features, then the node states after each layer.

        Under jit, states that the caller does not use cost nothing, because XLA removes their computation.
        """
        states = [NodeStates.of(obs)]
        for weights in self._weights(feature_widths(obs)):
            states.append(dense_layer(weights, states[-1], self.residual))
        return states

    def on_graph(self, graph: GraphsTuple, widths: tuple[int, ...], num_experts: int) -> jax.Array:
        """The embeddings of all nodes of a graph, float32 [V, hidden]; PADDING nodes have zeros.

        `graph` is a result of `to_graphs_tuple`, or a batch of them. `widths` are the `feature_widths` of the
        observations, because the graph's features are padded to one width. `num_experts` is the number of expert nodes
        in the whole batch.
        """
        return graph_layers(self._weights(widths), graph, num_experts, self.residual)

    def embed_by_graph(self, obs: RoutingGraph) -> jax.Array:
        """The embeddings of each observation's arrived node and experts, float32 [B, 1 + N, hidden], by
        `han_graph.embed_in_parts`. `obs` has any leading batch axes; B is their product.
        """
        return embed_in_parts(self._weights(feature_widths(obs)), obs, self.residual)

    def _weights(self, widths: tuple[int, ...]) -> list[LayerWeights]:
        first, *others = self.stack
        return [first(widths), *(layer((self.hidden,) * len(NODE_TYPES)) for layer in others)]
