"""The weights of a layer of the graph attention network, which both of its paths use."""

import flax.linen as nn
import flax.struct
import jax

from jaxroute.agent.node_types import EDGE_TYPES, NODE_TYPES


class LayerWeights(flax.struct.PyTreeNode):
    """The weights of one layer, from F features to hidden = H heads x D. All traced."""

    kernel: dict[str, jax.Array]  # per node type, float32 [F of the type, hidden]
    bias: dict[str, jax.Array]  # per node type, float32 [hidden]
    source: jax.Array  # float32 [6, H, D]: attention vectors of EDGE_TYPES for the source
    destination: jax.Array  # float32 [6, H, D]: the same for the destination
    semantic_kernel: jax.Array  # float32 [hidden, hidden], shared by the node types
    semantic_bias: jax.Array  # float32 [hidden]
    semantic_query: jax.Array  # float32 [hidden]


class HANLayer(nn.Module):
    """Declares the weights of one layer, for node features of the given widths (in the order of NODE_TYPES)."""

    hidden: int
    heads: int

    @nn.compact
    def __call__(self, widths: tuple[int, ...]) -> LayerWeights:
        """The weights; `widths` has F of each node type."""
        matrix, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        vectors = nn.initializers.glorot_uniform(batch_axis=0)
        attention_shape = (len(EDGE_TYPES), self.heads, self.hidden // self.heads)
        return LayerWeights(
            kernel={
                name: self.param(f"kernel_{name}", matrix, (width, self.hidden))
                for name, width in zip(NODE_TYPES, widths, strict=True)
            },
            bias={name: self.param(f"bias_{name}", zeros, (self.hidden,)) for name in NODE_TYPES},
            source=self.param("source", vectors, attention_shape),
            destination=self.param("destination", vectors, attention_shape),
            semantic_kernel=self.param("semantic_kernel", matrix, (self.hidden, self.hidden)),
            semantic_bias=self.param("semantic_bias", zeros, (self.hidden,)),
            semantic_query=self.param("semantic_query", nn.initializers.normal(self.hidden**-0.5), (self.hidden,)),
        )
