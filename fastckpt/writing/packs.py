"""Packs: the chunks of a save, gathered into objects of some megabytes and uploaded over several connections.

    begin() ─→ Pack: chunks are encoded in its memory ─→ seal(pack) ─→ connections × put, whole, in any order ─→ finish()

A pack is one put, retried whole: no multipart state, no debris that nobody sees. Each encoding thread fills a pack of its own, so no byte
is copied between the encoder and the store. When all memory is on its way, `begin` waits, and that wait is the back-pressure that the
encoder feels.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from fastckpt import events
from fastckpt._types import U8
from fastckpt.errors import SaveError, StoreError
from fastckpt.events import logger
from fastckpt.format.digest import crc64nvme_combine
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, pack_key
from fastckpt.host.threads import WorkerPool
from fastckpt.store.base import Store
from fastckpt.store.body import Body
from fastckpt.writing.uplink import Uplink

_LOOK_S = 0.5
"""Interval at which somebody who waits looks whether the save was cancelled."""


class Pack:
    """One pack that is being filled, by one thread."""

    __slots__ = ("_buffer", "_capacity", "crc64nvme", "n_bytes", "number")

    def __init__(self, buffer: U8, capacity: int) -> None:
        self._buffer, self._capacity = buffer, capacity
        self.number: int | None = None
        """None: nothing has been kept in it yet. A pack without bytes is never put."""
        self.n_bytes = self.crc64nvme = 0

    @property
    def buffer(self) -> U8:
        """All of its memory."""
        return self._buffer

    @property
    def room(self) -> int:
        """Bytes that may still be added."""
        return self._capacity - self.n_bytes

    @property
    def rest(self) -> U8:
        """The memory that nothing has been kept in."""
        return self._buffer[self.n_bytes :]

    def keep(self, n_bytes: int, crc64nvme: int) -> int:
        """The first bytes of `rest` belong to the pack now; returns their offset in it. crc64nvme: of these bytes."""
        offset = self.n_bytes
        self.crc64nvme = crc64nvme_combine(self.crc64nvme, crc64nvme, n_bytes) if offset else crc64nvme
        self.n_bytes = offset + n_bytes
        return offset


class PackWriter:
    """Gives out packs, and puts those that were filled. Any thread. Use as a context manager."""

    def __init__(
        self,
        store: Store,
        save: SaveId,
        rank: int,
        pool: WorkerPool,
        uplink: Uplink,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """pool: the uploading threads, one for each connection; closed with this object. uplink: the save has begun there.
        cancelled: asked before every chunk; once it says True, everything here raises SaveError.
        """
        self._store, self._save, self._rank = store, save, rank
        self._pool, self._uplink, self._cancelled = pool, uplink, cancelled
        self.lock = threading.Condition()
        """Of everything here, of the uplink, and of the records of whoever encodes."""
        self._error: BaseException | None = None
        self._n_numbers = self._waiting = self._sending = 0
        self._files: dict[int, FileEntry] = {}
        self.stored_bytes = 0
        self.more = True
        """Chunks are still to be encoded; set by whoever encodes."""

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def remove(self) -> None:
        """After a failure, before there is a vote: delete what was uploaded. Packs that the store does not delete stay as debris, as after
        a kill.
        """
        for number in range(self._n_numbers):
            key = pack_key(self._save, self._rank, number)
            try:
                self._store.delete(key)
            except StoreError as error:
                logger.warning("what is left of the failed save of step %d stays: %s", self._save.step, error)
                return

    # -- the encoders --------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Raise the error of an upload, or SaveError if the save was cancelled."""
        if self._error is not None:
            raise self._error
        if self._cancelled():
            raise SaveError(f"the save of step {self._save.step} was cancelled. Nothing was committed")

    def fail(self, error: BaseException) -> None:
        """Make everything here raise this error, unless there was one before."""
        with self.lock:
            self._error = self._error or error
            self.lock.notify_all()

    def begin(self, left_bytes: int) -> Pack:
        """An empty pack, once there is memory for it. left_bytes: raw bytes that are still to be saved. Raises what `refuse` does."""
        while True:
            self.refuse()  # without the lock: whether the save was cancelled may have to be asked elsewhere
            with self.lock:
                buffer = self._uplink.buffers.take(self._uplink.packs_at_once)
                if buffer is not None:
                    return Pack(buffer, self._uplink.pack_bytes(left_bytes, buffer.size))
                if self._error is None:
                    self.lock.wait(_LOOK_S)

    def keep(self, pack: Pack, n_bytes: int, crc64nvme: int) -> tuple[int, int]:
        """Keep the first bytes of the pack's rest. Returns the file number and the offset. The caller holds the lock."""
        if pack.number is None:
            pack.number, self._n_numbers = self._n_numbers, self._n_numbers + 1
        self.stored_bytes += n_bytes
        return pack.number + 1, pack.keep(n_bytes, crc64nvme)  # file 0 is the vote itself

    def seal(self, pack: Pack) -> None:
        """Start the upload of a pack; nothing is added to it any more. An empty one, or one of a failed save, is only taken back."""
        with self.lock:
            if pack.number is None or self._error is not None:
                self._uplink.buffers.give_back(pack.buffer)
                self.lock.notify_all()
                return
            self._waiting += 1
        self._pool.submit(functools.partial(self._upload, pack))

    # -- the connections -----------------------------------------------------------------------------------------------

    def _upload(self, pack: Pack) -> None:
        with self.lock:
            self._waiting, self._sending = self._waiting - 1, self._sending + 1
        try:
            entry = None if self._error is not None else self._put(pack)
        except BaseException as error:
            self.fail(error)
            entry = None
        with self.lock:
            self._sending -= 1
            if entry is not None and pack.number is not None:
                self._files[pack.number] = entry
            self._uplink.buffers.give_back(pack.buffer)
            self.lock.notify_all()

    def _put(self, pack: Pack) -> FileEntry:
        assert pack.number is not None
        key = pack_key(self._save, self._rank, pack.number)
        self._uplink.limit.wait(pack.n_bytes, self.refuse)
        started = time.perf_counter()
        self._store.put(key, Body.of(pack.buffer[: pack.n_bytes], pack.crc64nvme))
        now = time.perf_counter()
        with self.lock:
            more = self._uplink.put_finished(
                now,
                pack.n_bytes,
                now - started,
                waiting=self._waiting,
                sending=self._sending,
                more=self.more,
            )
        if more:
            self._pool.grow(more)
        if events.enabled():
            events.emit(
                events.PackStored(
                    target=self._store.url,
                    key=key,
                    stored_bytes=pack.n_bytes,
                    seconds=now - started,
                    step=self._save.step,
                )
            )
        return FileEntry(key, pack.n_bytes, pack.crc64nvme)

    def finish(self) -> list[FileEntry]:
        """Wait until all packs are durable. Returns them in the order of their file numbers, which start at 1."""
        while True:
            self.refuse()
            with self.lock:
                if not self._waiting and not self._sending and self._error is None:
                    return [self._files[number] for number in range(self._n_numbers)]
                if self._error is None:
                    self.lock.wait(_LOOK_S)
