"""The one exception that a user's mistake raises, how a command reports it, and the nearest of known names."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class UserError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where (file, line, key), and the remedy."""


class Interrupted(KeyboardInterrupt):
    """A signal that a command has met: its message says how to go on, `code` is the exit code, 128 and the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


def require_known(name: Any, names: Iterable[str], what: str, where: str = "") -> str:
    """`name`, if it is one of `names`; else a `UserError`, which begins with `where`, with the nearest ones."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
        raise UserError(f"{where}unknown {what} '{name}'; the nearest are {', '.join(near)}")
    return name


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wraps a command's `main(argv) -> exit code`: a line on stderr for a `UserError` (2) and signals (130, 143)."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or "interrupted", file=sys.stderr)
            return getattr(interrupt, "code", 130)

    return run
