"""One recorded request, as the readers of formats yield it."""

from typing import Any, NamedTuple

from jaxroute.workload.files import Place

HASHED_TOKENS = 512
"""Prompt tokens of one of Mooncake's hash_ids; the last one of a prompt may stand for fewer."""

Time = tuple[int, float]
"""Whole seconds and a rest: as one float, seconds since 1970 would lose digits of the fraction."""


class Record(NamedTuple):
    """A request. `first`, `last` are the times of its first and last token on the clock of `start`."""

    place: Place
    time: Time  # of the arrival
    prompt: int  # tokens
    output: int
    start: Time | None = None  # None: no times of tokens
    first: Time | None = None
    last: Time | None = None
    identity: Any = None
    shared: int | None = None  # leading tokens of the prompt that an earlier one shares
    untimed: str | None = None  # why the times of its tokens cannot be used
    hash_ids: tuple[int, ...] | None = None  # one for each `HASHED_TOKENS` of the prompt; equal ones are equal prefixes
