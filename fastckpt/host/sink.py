"""What a file, an object or a stream is to the code that writes a checkpoint: written front to back, then whole or forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar


class Sink(Protocol):
    """Where bytes go: written front to back, then finished or abandoned. Used by one thread.

    `host/files.py` has the one that replaces a file; `writing/sinks.py`, `writing/object_sink.py` and `writing/ordered_sink.py` the others.
    """

    def write(self, data: Any) -> None:
        """Append a buffer. On return the caller may reuse it."""

    def commit(self) -> None:
        """Make what was written durable and visible (paths) or flush it (file objects)."""

    def abandon(self) -> None:
        """Forget what was written: the target stays as it was. Never raises. May be called after a `commit` that failed."""


S = TypeVar("S", bound=Sink)


@contextlib.contextmanager
def abandoning(sink: S) -> Iterator[S]:
    """Abandons if the block ends in an error, KeyboardInterrupt included."""
    try:
        yield sink
    except BaseException:
        sink.abandon()
        raise


@contextlib.contextmanager
def committing(sink: S) -> Iterator[S]:
    """Commits at the end of the block; abandons if the block or the commit ends in an error, KeyboardInterrupt included.

    A generator, so that an interrupt which comes just as the block ends abandons too: at the latest when the generator is collected.
    """
    try:
        yield sink
        sink.commit()
    except BaseException:
        sink.abandon()
        raise
