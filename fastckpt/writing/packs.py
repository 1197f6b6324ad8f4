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
    """Choose the length of the packs of a save: small enough that each connection gets two packs, and that all buffers fit their part of
    the budget.
    """
    return max(MIN_PACK_BYTES, min(raw_bytes // (2 * options.connections), options.max_pack_bytes))


class PackBuffers:
    """Memory for packs, kept from save to save: allocating fresh pages costs three times as much as the copy into them. Used by one save at
    a time.
    """

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self, n_bytes: int) -> Buffer:
        """A buffer of at least this size, and at most twice as large."""
        self._free = [one for one in self._free if n_bytes <= one.size <= 2 * n_bytes]
        return self._free.pop() if self._free else fresh_pages(n_bytes)

    def give_back(self, buffers: list[Buffer]) -> None:
        """Take buffers back that nobody reads any more."""
        self._free += buffers

    def drop(self) -> None:
        """Free the memory; there will be no other save."""
        self._free = []


class _Rotation:
    """The buffers of one save: filled, sent, and filled again. Used by the thread that adds chunks."""

    def __init__(self, buffers: PackBuffers, n_bytes: int, most: int) -> None:
        """buffers: where buffers come from and go back to. n_bytes: size of each buffer. most: largest number of buffers."""
        self._buffers, self._n_bytes, self._most = buffers, n_bytes, most
        self._taken: list[Buffer] = []
        self._free: list[Buffer] = []

    def take(self) -> Buffer | None:
        """An empty buffer; None while all are being sent."""
        if self._free:
            return self._free.pop()
        if len(self._taken) == self._most:
            return None
        self._taken.append(self._buffers.take(self._n_bytes))
        return self._taken[-1]

    def put_back(self, buffer: Buffer) -> None:
        """The buffer's content has been sent: it may be filled again."""
        self._free.append(buffer)

    def close(self) -> None:
        """Give all buffers back: nobody reads them any more."""
        self._buffers.give_back(self._taken)
        self._taken, self._free = [], []


class _Pack:
    """One pack that is being filled or sent."""

    def __init__(self, number: int, buffer: Buffer) -> None:
        self.number, self.buffer = number, buffer
        self.n_bytes = 0
        """Number of bytes of the buffer that are filled."""

    def add(self, view: memoryview) -> int:
        """Append bytes; returns their offset."""
        offset = self.n_bytes
        np.copyto(self.buffer[offset : offset + view.nbytes], np.frombuffer(view, np.uint8))  # releases the GIL
        self.n_bytes += view.nbytes
        return offset


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
        """pool: the uploading threads, one for each connection; closed with this object. cancelled: asked before every chunk; once it says
        True, `add` and `finish` raise SaveError.
        """
        self._cancelled = cancelled
        self._store = store
        self._save = save
        self._rank = rank
        self._pack_bytes = pack_bytes
        self._pool = pool
        self._buffers = _Rotation(buffers or PackBuffers(), pack_bytes, connections + 1)
        self._current: _Pack | None = None
        self._sealed = 0
        self._pending: deque[Future[tuple[Buffer, FileEntry]]] = deque()
        self._files: list[FileEntry] = []
        self.stored_bytes = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        self._buffers.close()

    def remove(self) -> None:
        """After a failure, before there is a vote: delete what was uploaded. Packs that the store does not delete stay as debris, as after
        a kill.
        """
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
        if self._current is not None and self._current.n_bytes + view.nbytes > self._pack_bytes:
            self._seal(self._current)
        if self._current is None:
            self._current = _Pack(self._sealed, self._buffer())
        offset = self._current.add(view)
        self.stored_bytes += view.nbytes
        return self._sealed + 1, offset  # file 0 is the vote itself

    def _refuse_cancelled(self) -> None:
        if self._cancelled():
            raise SaveError(f"the save of step {self._save.step} was cancelled. Nothing was committed")

    def _buffer(self) -> Buffer:
        while (buffer := self._buffers.take()) is None:
            self._collect()
        return buffer

    def _collect(self) -> None:
        """Take back the buffer of the oldest pack in flight. Raises the error of its upload."""
        buffer, entry = self._pending.popleft().result()
        self._files.append(entry)
        self._buffers.put_back(buffer)

    def _seal(self, pack: _Pack) -> None:
        """Start the upload of a pack; nothing is added to it any more."""
        self._pending.append(self._pool.submit(functools.partial(self._upload, pack)))
        self._sealed += 1
        self._current = None

    def _upload(self, pack: _Pack) -> tuple[Buffer, FileEntry]:
        started = time.perf_counter()
        key = pack_key(self._save, self._rank, pack.number)
        stored = pack.buffer.data[: pack.n_bytes]
        entry = FileEntry(key, pack.n_bytes, crc64nvme(stored))
        self._store.put(key, stored)
        stored.release()
        seconds = time.perf_counter() - started
        events.emit(
            events.PackStored(
                target=self._store.url, key=key, stored_bytes=pack.n_bytes, seconds=seconds, step=self._save.step
            )
        )
        return pack.buffer, entry

    def finish(self) -> list[FileEntry]:
        """Upload the rest and wait for all. Returns the packs in the order of their file numbers, which start at 1."""
        if self._current is not None:
            self._seal(self._current)
        while self._pending:
            self._refuse_cancelled()
            self._collect()
        self._refuse_cancelled()
        return self._files
