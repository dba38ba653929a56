"""Heterogeneous graph attention network (Wang et al., 2019) on the routing graph: one set of weights, two equal paths.

A layer, as PyTorch Geometric's HANConv: every node type is projected; for each edge type a node attends over its
neighbours (several heads, LeakyReLU 0.2, softmax, ReLU after the sum, zeros without neighbours); semantic attention
then mixes the edge types that reach a node. `residual` adds the node's own projection, without which an expert's own
features never become part of the arrived node's message in two layers (simulation.md section 5); `residual=False` is
the paper's network.

The dense path (`HAN.__call__`, `HAN.states`; `han_dense.py`) works on arrays with masks. The jraph path
(`HAN.on_graph`, `HAN.embed_by_graph`; `han_graph.py`) works on a batched `jraph.GraphsTuple`, in which empty queue
slots have no part. Tests hold the two equal; benchmarks/results.md says which is faster where.
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
        """A layer's weights for each of `layers`."""
        self.stack = [HANLayer(self.hidden, self.heads) for _ in range(self.layers)]

    def __call__(self, obs: RoutingGraph) -> dict[str, jax.Array]:
        """The embeddings by node type, float32: arrived [..., hidden], expert [..., N, hidden], running and waiting
        [..., N, K, hidden], zeros for masked slots.
        """
        return self.states(obs)[-1].by_node(obs.arrived.shape[:-1])

    def states(self, obs: RoutingGraph) -> list[NodeStates]:
        """The raw features, then the node states after each layer.

        Under jit a state that is not used costs nothing: the last layer computes only what the others need.
        """
        states = [NodeStates.of(obs)]
        for weights in self._weights(feature_widths(obs)):
            states.append(dense_layer(weights, states[-1], self.residual))
        return states

    def on_graph(self, graph: GraphsTuple, widths: tuple[int, ...], num_experts: int) -> jax.Array:
        """The embeddings float32 [V, hidden] of all nodes of a graph; zeros for PADDING nodes.

        `graph`: `to_graphs_tuple`, or a batch of such. `widths`: `feature_widths` of the observations, since the
        graph's own features are padded to one width. `num_experts`: expert nodes in all of the batch.
        """
        return graph_layers(self._weights(widths), graph, num_experts, self.residual)

    def embed_by_graph(self, obs: RoutingGraph) -> jax.Array:
        """The embeddings float32 [B, 1 + N, hidden] of each observation's arrived node and experts, as
        `han_graph.embed_in_parts` computes them; any leading batch axes, B in all.
        """
        return embed_in_parts(self._weights(feature_widths(obs)), obs, self.residual)

    def _weights(self, widths: tuple[int, ...]) -> list[LayerWeights]:
        first, *others = self.stack
        return [first(widths), *(layer((self.hidden,) * len(NODE_TYPES)) for layer in others)]
