"""A request that another library forwards to the servers: its decisions, its progress and its one end."""

import asyncio

from jaxroute.serving.call import Outcome
from jaxroute.serving.dispatch import Dispatcher
from jaxroute.serving.openai import Completion

REST_SECONDS = 5.0
"""An expert that has failed a request gets no other one for so long."""


class Forwarded:
    """A request from its arrival to its end, in the dispatcher's event loop. `end` may be called more than once."""

    def __init__(self, dispatcher: Dispatcher, asked: Completion):
        """The request has just arrived."""
        self._dispatcher, self._call, self._failed = dispatcher, dispatcher.call(asked), None
        self.expert: int | None = None  # where it is
        self._attempted = False

    def choose(self) -> int:
        """The number of its expert, another one if it had one, which has failed then. Raises `Refused` if dropped."""
        self.end("failed")
        self.expert = self._dispatcher.begin(self._call, without=self._failed)
        return self.expert

    def attempt(self) -> int:
        """The expert of the next attempt: at first the one that was chosen, and then others. Raises `Refused`."""
        if self._attempted or self.expert is None:
            self.choose()
        assert self.expert is not None
        self._attempted = True
        return self.expert

    def progress(self, tokens: int, prompt_tokens: int | None = None) -> None:
        """The answer has `tokens` up to now; the length of the prompt, once it is known."""
        if self.expert is not None:
            self._dispatcher.progress(self._call, tokens, prompt_tokens)

    def next_token(self) -> None:
        """The answer has one more token."""
        self.progress(self._call.tokens + 1)

    def end(self, outcome: Outcome) -> None:
        """Frees its slot, if it has one. An expert that has failed it rests."""
        if self.expert is None:
            return
        if outcome == "failed":
            self._failed, up = self.expert, self._dispatcher.up
            up[self.expert] = False
            asyncio.get_running_loop().call_later(REST_SECONDS, up.__setitem__, self.expert, True)
        self.expert = None
        self._dispatcher.end(self._call, outcome)
