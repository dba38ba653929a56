"""Turns SIGINT and SIGTERM into a flag that commands poll between chunks."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from jaxroute.errors import Interrupted


class Stop:
    """Whether a signal has come. As a context manager, it becomes true at the first SIGINT or SIGTERM, without any
    other effect; a second signal has its usual effect.

    Outside of the main thread, where Python allows no handlers, signals are not changed.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._earlier: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()

    def interrupted(self, message: str) -> Interrupted:
        """The exception to raise if the flag is true."""
        return Interrupted(message, self._number or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
