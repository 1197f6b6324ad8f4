"""The interface of a file, an object or a stream for the code that writes a checkpoint: written from front to back, then committed or
abandoned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar


class Sink(Protocol):
    """A place for bytes: written from front to back, then committed or abandoned. Used by one thread.

    Implementations: `host/files.py` replaces a file; the others are in `writing/sinks.py`, `writing/object_sink.py` and
    `writing/ordered_sink.py`.
    """

    def write(self, data: Any) -> None:
        """Append a buffer. On return the caller may reuse it."""

    def commit(self) -> None:
        """Make the written bytes durable and visible (paths), or flush them (file objects)."""

    def abandon(self) -> None:
        """Forget the written bytes: the target stays as it was. Never raises. May be called after a `commit` that failed."""


S = TypeVar("S", bound=Sink)


@contextlib.contextmanager
def abandoning(sink: S) -> Iterator[S]:
    """Abandon the sink if the block ends in an error, KeyboardInterrupt included."""
    try:
        yield sink
    except BaseException:
        sink.abandon()
        raise


@contextlib.contextmanager
def committing(sink: S) -> Iterator[S]:
    """Commit the sink at the end of the block. Abandon it if the block or the commit ends in an error, KeyboardInterrupt included.

    This is a generator so that an interrupt at the very end of the block abandons the sink, too: at the latest when the generator is
    collected.
    """
    try:
        yield sink
        sink.commit()
    except BaseException:
        sink.abandon()
        raise
