"""A request from its arrival to its end."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxroute.serving.ledger import Ticket
from jaxroute.serving.openai import Completion, Limit

Outcome = Literal["completed", "failed", "cancelled", "refused"]
"""How a request that was sent ended: refused is a server's error about the request itself."""


@dataclass
class Call:
    """A request at a server, or at one after the other."""

    asked: Completion
    arrival: float  # s, monotonic, as are all times
    limit: Limit
    predicted_scores: np.ndarray  # float32 [N]
    predicted_lengths: np.ndarray  # int32 [N]
    prompt_estimate: int
    work: float  # s that its prediction and its decisions took
    ticket: Ticket | None = None  # while it is at a server
    sent: float = 0.0  # to the present server
    alone: bool = False  # there was no other at the server when it was sent
    first_token: float | None = None
    tokens: int = 0
    prompt_tokens: int | None = None  # once the server has said it

    @property
    def expert(self) -> int:
        """The server that it is at."""
        assert self.ticket is not None
        return self.ticket.expert
