"""Descriptors of the files of a load, each opened once: chains read a few rows here and a few there, and opening is no cheaper."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from fastckpt.reading.sources import Source

MOST_KEPT = 64
"""Descriptors that stay open. A checkpoint may have more packs than a process may have descriptors."""


class OpenFiles:
    """See the module. Any number of threads at once, but for `close`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._kept: dict[int, int] = {}
        """Number of a source → its descriptor."""
        self._owner = ExitStack()

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """A descriptor of a source that is a file, open at least while the context is. StoreError, OSError: it cannot be opened."""
        with self._lock:
            kept = self._kept.get(number)
        if kept is not None:
            yield kept
            return
        with ExitStack() as mine:
            file = mine.enter_context(self._sources[number].opened())
            with self._lock:
                if number not in self._kept and len(self._kept) < MOST_KEPT:
                    self._kept[number] = file
                    self._owner.push(mine.pop_all())
            yield file

    def close(self) -> None:
        """Close what is open. No thread uses a descriptor any more."""
        self._kept.clear()
        self._owner.close()
