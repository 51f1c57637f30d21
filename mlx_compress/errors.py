"""What a user can cause. Each error is one line and knows the exit code of the command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class CompressError(ValueError):
    """Anything that the command reports in one line instead of a traceback."""

    exit_code = 2


class InputError(CompressError):
    """Bad usage or bad input: exit code 2."""


class GateFailed(CompressError):
    """The result did not pass a check that was asked for: exit code 3."""

    exit_code = 3


class ResourceError(CompressError):
    """Not enough memory or disk: exit code 4."""

    exit_code = 4


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a CompressError into one line on stderr and the process's exit code: for `main()`s."""
    try:
        yield
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
