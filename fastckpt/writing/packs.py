"""Packs: the chunks of a save, gathered into objects of some megabytes and uploaded over several connections.

    add(stored) ─→ pack buffer ──full──→ queue ─→ connections × put, whole, in any order ─→ finish(): all durable

A pack is one put, retried whole: no multipart state, no debris that nobody sees. At most `connections + 1` buffers exist; when all are on
their way, `add` waits, and that wait is the back-pressure that the encoder feels.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt import events
from fastckpt.errors import SaveError, StoreError
from fastckpt.events import logger
from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, pack_key
from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import WorkerPool
from fastckpt.options import MIN_PACK_BYTES, Options
from fastckpt.store.base import Store

Buffer = npt.NDArray[np.uint8]


def choose_pack_bytes(raw_bytes: int, options: Options) -> int:
    """Length of the packs of a save: small enough that each connection gets two, and that all buffers fit their part of the budget."""
    return max(MIN_PACK_BYTES, min(raw_bytes // (2 * options.connections), options.max_pack_bytes))


class PackBuffers:
    """Memory for packs, kept from save to save: its fresh pages would cost three times the copy into them. One save at a time."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self, n_bytes: int) -> Buffer:
        """Of this size at least, and not twice as much."""
        self._free = [one for one in self._free if n_bytes <= one.size <= 2 * n_bytes]
        return self._free.pop() if self._free else fresh_pages(n_bytes)

    def give_back(self, buffers: list[Buffer]) -> None:
        """Nobody reads them any more."""
        self._free += buffers

    def drop(self) -> None:
        """Give the memory back; there will be no other save."""
        self._free = []


class _Lease:
    """The buffers of one save: no more than it may have, all of one size, all given back at its end."""

    def __init__(self, kept: PackBuffers, most: int, n_bytes: int) -> None:
        self._kept, self._left, self._n_bytes = kept, most, n_bytes
        self._all: list[Buffer] = []
        self._free: list[Buffer] = []

    def take(self) -> Buffer | None:
        """None: all are in use, and there may be no more."""
        if self._free:
            return self._free.pop()
        if not self._left:
            return None
        self._left -= 1
        self._all.append(self._kept.take(self._n_bytes))
        return self._all[-1]

    def put_back(self, buffer: Buffer) -> None:
        """It is not in use any more."""
        self._free.append(buffer)

    def end(self) -> None:
        """Nobody reads any of them any more."""
        self._kept.give_back(self._all)
        self._all = []


class PackWriter:
    """A Payload whose bytes go to a store. One thread adds; `connections` threads upload. Use as a context manager."""

    def __init__(
        self,
        store: Store,
        save: SaveId,
        rank: int,
        pack_bytes: int,
        connections: int,
        pool: WorkerPool,
        cancelled: Callable[[], bool] = lambda: False,
        buffers: PackBuffers | None = None,
    ) -> None:
        """pool: the threads that upload, as many as connections; closed with this. cancelled: asked before every chunk; once it says True,
        `add` and `finish` raise SaveError.
        """
        self._cancelled = cancelled
        self._store = store
        self._save = save
        self._rank = rank
        self._pack_bytes = pack_bytes
        self._pool = pool
        self._lease = _Lease(buffers or PackBuffers(), connections + 1, pack_bytes)
        self._current: Buffer | None = None
        self._filled = 0
        self._sealed = 0
        self._pending: deque[Future[tuple[Buffer, FileEntry]]] = deque()
        self._files: list[FileEntry] = []
        self.stored_bytes = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        self._lease.end()

    def remove(self) -> None:
        """After a failure, before there is a vote: delete what was uploaded. What the store keeps is debris, as after a kill."""
        for number in range(self._sealed):
            key = pack_key(self._save, self._rank, number)
            try:
                self._store.delete(key)
            except StoreError as error:
                logger.warning("what is left of the failed save of step %d stays: %s", self._save.step, error)
                return

    def add(self, stored: Any) -> tuple[int, int]:
        self._refuse_cancelled()
        view = memoryview(stored).cast("B")
        if self._current is not None and self._filled + view.nbytes > self._pack_bytes:
            self._seal()
        if self._current is None:
            self._current, self._filled = self._buffer(), 0
        offset = self._filled
        np.copyto(self._current[offset : offset + view.nbytes], np.frombuffer(view, np.uint8))  # lets go of the GIL
        self._filled += view.nbytes
        self.stored_bytes += view.nbytes
        return self._sealed + 1, offset  # file 0 is the vote itself

    def _refuse_cancelled(self) -> None:
        if self._cancelled():
            raise SaveError(f"the save of step {self._save.step} was cancelled. Nothing was committed")

    def _buffer(self) -> Buffer:
        while (buffer := self._lease.take()) is None:
            self._collect()
        return buffer

    def _collect(self) -> None:
        """Take back the oldest pack under way; raises what its upload raised."""
        buffer, entry = self._pending.popleft().result()
        self._files.append(entry)
        self._lease.put_back(buffer)

    def _seal(self) -> None:
        assert self._current is not None
        upload = functools.partial(self._upload, self._sealed, self._current, self._filled)
        self._pending.append(self._pool.submit(upload))
        self._sealed += 1
        self._current = None

    def _upload(self, number: int, buffer: Buffer, n_bytes: int) -> tuple[Buffer, FileEntry]:
        started = time.perf_counter()
        key = pack_key(self._save, self._rank, number)
        pack = buffer.data[:n_bytes]
        entry = FileEntry(key, n_bytes, crc64nvme(pack))
        self._store.put(key, pack)
        pack.release()
        seconds = time.perf_counter() - started
        events.emit(
            events.PackStored(
                target=self._store.url, key=key, stored_bytes=n_bytes, seconds=seconds, step=self._save.step
            )
        )
        return buffer, entry

    def finish(self) -> list[FileEntry]:
        """Upload the rest and wait for all. Returns the packs in the order of their file numbers, which start at 1."""
        if self._current is not None:
            self._seal()
        while self._pending:
            self._refuse_cancelled()
            self._collect()
        self._refuse_cancelled()
        return self._files
