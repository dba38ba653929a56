"""A request, with its length and score at each expert of a cluster."""

import jax
from flax import struct


class Request(struct.PyTreeNode):
    """One arriving request for N experts; every field is traced.

    True output lengths and scores are for the simulator and the reward; a router may only see the predicted ones.
    Floats have JAX's default float dtype (float32, or float64 under x64), integers are int32.
    """

    prompt_tokens: jax.Array  # int32 [], tokens of the prompt, at least 1
    output_tokens: jax.Array  # int32 [N], tokens that each expert would generate, at least 1
    score: jax.Array  # float [N], true quality of each expert's answer, 0 to 1
    predicted_output_tokens: jax.Array  # int32 [N], predictions of output_tokens for the router, at least 1
    predicted_score: jax.Array  # float [N], predictions of score for the router, about 0 to 1 (not clipped)
