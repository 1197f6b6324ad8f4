"""Threads that load ranges of files: each reads and decodes; where the disk has to be waited for, they are told to it ahead."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from fastckpt.errors import StoreError
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.ranges import Range

WAITING_THREADS = 2
"""Additional threads that wait for the disk while the others decode."""
_AHEAD_RANGES = 16  # of 4 to 16 MiB; a disk of 4 GB/s needs some 10 ms for each


class Workers:
    """See the module. `submit` and `close` are for one thread."""

    def __init__(self, threads: int, load: Callable[[Range], None], hint: Callable[[Range], None] | None) -> None:
        """Start the threads.

        Args:
            threads: how many decode. With a hint a few more, as some wait.
            load: reads and decodes a range; raises nothing.
            hint: tells the system that a range will be read soon; blocks while the disk is busy, so it has a thread of its own. None: reads
                do not wait.
        """
        self._load, self._hint = load, hint
        self._lock = threading.Lock()
        self._waiting: deque[Range] = deque()
        """Ranges that the system was not told of."""
        self._room = _AHEAD_RANGES
        self._pool = WorkerPool(threads + (hint is not None) * WAITING_THREADS, "fastckpt-load")
        self._hints = None if hint is None or self._pool.inline else WorkerPool(1, "fastckpt-read")
        self.inline = self._pool.inline
        """There are no threads, because the interpreter is ending."""

    def submit(self, range_: Range) -> None:
        """Load a range after those that were submitted before."""
        if self._hints is not None:
            with self._lock:
                self._waiting.append(range_)
            self._tell()
        self._pool.submit(functools.partial(self._run, range_))

    def close(self) -> None:
        """Drop what has not begun, wait for the rest, end the threads."""
        self._pool.close()
        if self._hints is not None:
            self._hints.close()

    def _run(self, range_: Range) -> None:
        if self._hints is not None:
            with self._lock:
                self._room += 1
            self._tell()
        self._load(range_)

    def _tell(self) -> None:
        """Tell the system of the next ranges."""
        while True:
            with self._lock:
                if not self._waiting or not self._room or self._hints is None or self._hint is None:
                    return
                self._room -= 1
                call = functools.partial(self._hint, self._waiting.popleft())
            self._hints.submit(call)


def read_soon(reader: Reader, range_: Range) -> None:
    """Let the system read the chunks of a range of a file into the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    chunks = reader.records[list(range_.chunks)]
    chunks = chunks[chunks["stored_bytes"] > 0]
    if not len(chunks):
        return
    starts = chunks["offset"].astype(np.int64) + (0 if range_.file else reader.start)
    # Without a page cache, or such a file, the read itself tells.
    with contextlib.suppress(OSError, StoreError), reader.sources[range_.file].opened() as file:
        for start, n_bytes in zip(starts.tolist(), chunks["stored_bytes"].tolist(), strict=True):
            os.posix_fadvise(file, start, n_bytes, os.POSIX_FADV_WILLNEED)


__all__ = ["WAITING_THREADS", "Workers", "read_soon"]
