"""A request, with its length and score at each expert of a cluster."""

import jax
from flax import struct


class Prefix(struct.PyTreeNode):
    """Which tokens a request, prompt and output, shares with others: K pieces; every field is traced.

    Piece k ends `end` tokens after the request's beginning. The beginnings of two requests are equal up to the smaller
    end of a piece in which both have the same owner, and a piece that both have comes after equal ones only. So each
    turn of a conversation has the conversation as its last owner, with an end behind its last token.
    """

    owner: jax.Array  # int32 [K], arbitrary numbers
    end: jax.Array  # int32 [K]; 0: no such piece


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
    prefix: Prefix | None = None  # what its prompt shares with others; None: nothing, in all requests of this kind
