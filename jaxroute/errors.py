"""The one exception that a user's mistake raises, and how a command reports it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where (file, line, key), and the remedy."""


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wraps a command's `main(argv) -> exit code`: a `UserError` is one line on stderr, exit code 2."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
