"""Threads that do the jobs of a load from files: each reads and decodes; where the disk has to be waited for, they are told to it ahead."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from fastckpt.errors import StoreError
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chains import Chain
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.jobs import Batch, Job

WAITING_THREADS = 2
"""Additional threads that wait for the disk while the others decode."""
_AHEAD_RANGES = 16  # of 4 to 16 MiB; a disk of 4 GB/s needs some 10 ms for each


class Workers:
    """See the module. `submit` and `close` are for one thread."""

    def __init__(self, threads: int, load: Callable[[Job], None], hint: Callable[[Job], None] | None) -> None:
        """Start the threads.

        Args:
            threads: how many decode. With a hint a few more, as some wait.
            load: does a job: reads and decodes; raises nothing.
            hint: tells the system what a job will read soon; blocks while the disk is busy, so it has a thread of its own. None: reads
                do not wait.
        """
        self._load, self._hint = load, hint
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        """Jobs that the system was not told of."""
        self._room = _AHEAD_RANGES
        self._pool = WorkerPool(threads + (hint is not None) * WAITING_THREADS, "fastckpt-load")
        self._hints = None if hint is None or self._pool.inline else WorkerPool(1, "fastckpt-read")
        self.inline = self._pool.inline
        """There are no threads, because the interpreter is ending."""

    def submit(self, job: Job) -> None:
        """Do a job after those that were submitted before."""
        if self._hints is not None:
            with self._lock:
                self._waiting.append(job)
            self._tell()
        self._pool.submit(functools.partial(self._run, job))

    def close(self) -> None:
        """Drop what has not begun, wait for the rest, end the threads."""
        self._pool.close()
        if self._hints is not None:
            self._hints.close()

    def _run(self, job: Job) -> None:
        if self._hints is not None:
            with self._lock:
                self._room += 1
            self._tell()
        self._load(job)

    def _tell(self) -> None:
        """Tell the system of the next jobs."""
        while True:
            with self._lock:
                if not self._waiting or not self._room or self._hints is None or self._hint is None:
                    return
                self._room -= 1
                call = functools.partial(self._hint, self._waiting.popleft())
            self._hints.submit(call)


def read_soon(reader: Reader, chains: Sequence[Chain], job: Job) -> None:
    """Let the system read the rows of a job into the page cache. chains: of the load."""
    if not hasattr(os, "posix_fadvise"):
        return
    numbers = [link.row for n in job.chains for link in chains[n].links] if isinstance(job, Batch) else job.chunks
    rows = reader.records[list(numbers)]
    rows = rows[rows["stored_bytes"] > 0]
    for file in np.unique(rows["file"]).tolist():
        some = rows[rows["file"] == file]
        starts = some["offset"].astype(np.int64) + (0 if file else reader.start)
        # Without a page cache, or such a file, the read itself tells.
        with contextlib.suppress(OSError, StoreError), reader.sources[file].opened() as opened:
            for start, n_bytes in zip(starts.tolist(), some["stored_bytes"].tolist(), strict=True):
                os.posix_fadvise(opened, start, n_bytes, os.POSIX_FADV_WILLNEED)


__all__ = ["WAITING_THREADS", "Workers", "read_soon"]
