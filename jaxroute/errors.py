"""The exception for user errors, how commands report it, and suggestions for unknown names."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class UserError(Exception):
    """Invalid input. The message is one line: what is wrong, where (file, line, key), and how to correct it."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a command. The message says how to resume; `code` is the exit code, 128 plus the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


def require_known(name: Any, names: Iterable[str], what: str, where: str = "") -> str:
    """`name`, if it is one of `names`; otherwise a `UserError` that begins with `where` and suggests similar names."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
        known = f"the nearest are {', '.join(near)}" if near else "there is none"
        raise UserError(f"{where}unknown {what} '{name}'; {known}")
    return name


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wraps `main(argv) -> exit code`: prints one line for a `UserError` (exit code 2) and for signals (130, 143)."""

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
