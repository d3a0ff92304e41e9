"""What ends a command: a sentence for the user instead of a traceback, and what an interrupted run has kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Something the caller can mend; `main` prints it on one line and exits with 2."""


@contextmanager
def resumable(kept: Callable[[], str], command: str) -> Iterator[None]:
    """Ctrl-C inside says what is kept, `3 of 40 answers in ruler.answers`, and that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{kept()} are kept; the same command goes on from there: {command}") from None
