"""The node and edge types of the routing graph, and the constants that both implementations of the network share.

Integer types: type 0 is PADDING. A PADDING edge carries no message, and a PADDING node stays zero.
"""

from jaxroute.environment.observation import RoutingGraph

PADDING = 0
NODE_TYPES = ("arrived", "expert", "running", "waiting")  # integer type = index + 1
EDGE_TYPES = (  # (source, destination); integer type = index + 1
    ("arrived", "expert"),
    ("expert", "arrived"),
    ("running", "expert"),
    ("expert", "running"),
    ("waiting", "expert"),
    ("expert", "waiting"),
)
QUEUES = ("running", "waiting")
LEAKY_SLOPE = 0.2  # negative slope of the attention's LeakyReLU


def node_type(name: str) -> int:
    """The integer type of the nodes called `name`, one of NODE_TYPES."""
    return NODE_TYPES.index(name) + 1


def edges_into(name: str) -> list[int]:
    """The indices in EDGE_TYPES of the edge types whose destination is `name`."""
    return [index for index, (_, destination) in enumerate(EDGE_TYPES) if destination == name]


def feature_widths(obs: RoutingGraph) -> tuple[int, ...]:
    """Number of features of each node type, in the order of NODE_TYPES."""
    return tuple(getattr(obs, name).shape[-1] for name in NODE_TYPES)
