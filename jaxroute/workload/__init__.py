"""Requests and their arrivals: `Workload.sample` draws the next arrival from a key, inside jit and vmap.

Arrivals are a Poisson process, a process with bursts, a recorded trace, or have piecewise constant rates. Requests come
from the frozen generator of the paper's scenarios, from quantiles of the lengths of public traces, from log-normal
lengths, from a table of recorded answers, or from the lengths of the trace; or they share prefixes, as turns of
conversations or questions about documents.
The loaders read recorded answers and traces.
"""

from jaxroute.workload.arrivals import MarkovArrivals, PiecewiseArrivals, PoissonArrivals, TraceArrivals, WorkloadState
from jaxroute.workload.frozen import predict_with_frozen_errors
from jaxroute.workload.lognormal import LognormalRequests
from jaxroute.workload.mixinstruct import load_mixinstruct
from jaxroute.workload.prefixes import ConversationRequests, DocumentRequests, Tokens
from jaxroute.workload.request import Prefix, Request
from jaxroute.workload.requests import FrozenRequests, QuantileRequests, TableRequests, TraceRequests
from jaxroute.workload.table import RequestTable, Trace
from jaxroute.workload.trace import load_trace
from jaxroute.workload.workload import Workload

__all__ = [
    "ConversationRequests",
    "DocumentRequests",
    "FrozenRequests",
    "LognormalRequests",
    "MarkovArrivals",
    "PiecewiseArrivals",
    "PoissonArrivals",
    "Prefix",
    "QuantileRequests",
    "Request",
    "RequestTable",
    "TableRequests",
    "Tokens",
    "Trace",
    "TraceArrivals",
    "TraceRequests",
    "Workload",
    "WorkloadState",
    "load_mixinstruct",
    "load_trace",
    "predict_with_frozen_errors",
]
