"""Storages out of a container: read, verified, decoded and put in place by several threads, ahead of the unpickler.

    unpickler ── take(n) ──→ StorageLoader ── schedules chunks ──→ threads: read → crc → decode → digest → into the storage

Chunks are decoded once each, straight into the memory that the caller will own; only a chunk that serves several storages passes
through a scratch buffer. At most `window_bytes` of storages that nobody has taken yet are in memory: all of them when they
stay in host memory anyway, a few when each one goes on to a device.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt import events
from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, Damage, TooLargeError
from fastckpt.format.records import transform_of
from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import WorkerPool
from fastckpt.reading.chunk_reader import Reader

# Enough chunks ahead to keep 16 threads busy while a storage travels to a device.
DEVICE_WINDOW_BYTES = 256 << 20
_ALIGNMENT_BYTES = 64
_MAPPED_BYTES = 1 << 20
_AHEAD_CHUNKS = 32  # up to 64 MiB
# Threads more than asked for, that wait for the disk while the others decode: 505 MB cold in 0.48 s instead of 0.55, on two
# cores. They decode no more at a time. From the page cache they would cost 4 %, so they are not started then.
_WAITING_THREADS = 2
_INLINE_BYTES = 4 << 20  # below this, starting threads takes longer than the work


def check_size(reader: Reader, needed_bytes: int, max_load_bytes: int) -> None:
    """TooLargeError if storages need more than may be allocated. Before anything is."""
    if needed_bytes > max_load_bytes:
        raise TooLargeError(
            f"{reader.source.name} says that it holds {needed_bytes} bytes of tensors in a file of {reader.source.n_bytes}; at most "
            f"{max_load_bytes} may be allocated here. If you trust it, set FASTCKPT_MAX_LOAD_BYTES, or fetch single tensors "
            "with fastckpt.open"
        )


def _new_memory(n_bytes: int) -> U8:
    """Memory of its own for one storage, aligned as torch aligns its."""
    if n_bytes >= _MAPPED_BYTES:
        return fresh_pages(n_bytes)
    room = np.empty(n_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -room.__array_interface__["data"][0] % _ALIGNMENT_BYTES
    return room[start : start + n_bytes]


def _pool(threads: int, name: str) -> WorkerPool | None:
    """None where the interpreter's end allows no threads: then nothing is read ahead of the unpickler, which would only wait for it."""
    pool = WorkerPool(threads, name)
    return None if pool.inline else pool


class _Loading:
    """One storage on its way: its memory, and how many chunks are still missing."""

    def __init__(self, n_bytes: int) -> None:
        # NumPy's memory: a storage over it cannot be resized, as torch.load's cannot. One that can would let a hostile skeleton
        # ask for a tensor past its end and get whatever lies in fresh memory.
        self.view = _new_memory(n_bytes)
        self.storage: UntypedStorage = torch.from_numpy(self.view).untyped_storage()
        self.missing = 0


class LastChunk:
    """The chunk that was decoded last for the sake of a part of it: who fetches small tensors one by one finds the next one there."""

    def __init__(self) -> None:
        self._held: tuple[int, U8] | None = None

    def get(self, record: int) -> U8 | None:
        """Its raw bytes, if it is this one. Any thread."""
        held = self._held
        return held[1] if held is not None and held[0] == record else None

    def put(self, record: int, raw: U8) -> None:
        """Keep the bytes of a chunk, verified, instead of the one before. Any thread."""
        self._held = (record, raw)

    def let_go(self) -> None:
        """Keep none."""
        self._held = None


class StorageLoader:
    """A StorageProvider over a container. Use as a context manager; one thread takes, `threads` decode."""

    def __init__(
        self,
        reader: Reader,
        threads: int,
        window_bytes: int | None,
        wanted: Sequence[int] | None = None,
        last_chunk: LastChunk | None = None,
    ) -> None:
        """window_bytes: see the module; None: no limit. wanted: the only storages that will be taken, in this order; None: any."""
        self._reader = reader
        self._window_bytes = window_bytes
        self._storages = reader.directory.storages
        self._order = range(len(self._storages)) if wanted is None else wanted
        self._last_chunk = last_chunk
        self._by_record: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        self._records_of: dict[int, list[int]] = {}
        for number in self._order:
            records = self._records_of[number] = []
            for record, offset, position, n_bytes in reader.pieces(number):
                self._by_record[record].append((number, offset, position, n_bytes))
                records.append(record)
        self._loading: dict[int, _Loading] = {}
        self._entered: set[int] = set()  # storages that have got their memory, once
        self._scheduled: set[int] = set()
        self._next = 0
        self._hinted = 0
        self._held_bytes = 0
        self._damage: list[Damage] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        n_bytes = sum(self._storages[number].n_bytes for number in self._order if self.has_data(number))
        inline = n_bytes <= _INLINE_BYTES or threads == 1
        waits = not inline and reader.source.waits_for_a_disk()
        self._decoders = threading.BoundedSemaphore(threads)
        self._pool = None if inline else _pool(threads + waits * _WAITING_THREADS, "fastckpt-load")
        # Of its own: the system call itself takes as long as the disk, once that has enough to do.
        self._ahead = _pool(1, "fastckpt-read") if waits and self._pool is not None else None

    def __enter__(self) -> StorageLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._pool, self._ahead):
            if pool is not None:
                pool.close()

    def n_bytes(self, number: int) -> int | None:
        return self._storages[number].n_bytes if number < len(self._storages) else None

    def has_data(self, number: int) -> bool:
        return self._storages[number].extents is not None

    def take(self, number: int) -> UntypedStorage:
        """The storage, whole and verified. CorruptCheckpointError lists all damage of the whole container."""
        ready = self._loading.get(number) if self._pool is None else None
        if ready is not None and not ready.missing and not self._damage and self._error is None:
            # Read already, on this thread, for the sake of another one in its bundle: no other thread to agree with.
            self._held_bytes -= self._storages[number].n_bytes
            del self._loading[number]
            return ready.storage
        self._schedule_storage(number)
        self._schedule_ahead()
        with self._changed:
            loading = self._loading[number]
            self._changed.wait_for(lambda: not loading.missing or self._damage or self._error)
            if self._error is not None:
                raise self._error
            damaged = bool(self._damage)
            if not damaged:
                del self._loading[number]
                self._held_bytes -= self._storages[number].n_bytes
        if damaged:
            self._raise_all_damage()
        self._schedule_ahead()
        return loading.storage

    def _schedule_ahead(self) -> None:
        if self._pool is None:
            return
        while self._next < len(self._order):
            if self._window_bytes is not None and self._held_bytes >= self._window_bytes:
                return
            self._schedule_storage(self._order[self._next])
            self._next += 1

    def _schedule_storage(self, number: int) -> None:
        self._allocate(number)
        for record in self._records_of[number]:
            if record in self._scheduled:
                continue
            self._scheduled.add(record)
            for other, *_ in self._by_record[record]:
                self._allocate(other)
            if self._pool is None:
                self._load_chunk(record)
            else:
                self._pool.submit(functools.partial(self._load_chunk, record))

    def _allocate(self, number: int) -> None:
        with self._changed:
            if number in self._entered or not self.has_data(number):
                return
            self._entered.add(number)
            loading = self._loading[number] = _Loading(self._storages[number].n_bytes)
            loading.missing = len(self._records_of[number])
            self._held_bytes += self._storages[number].n_bytes

    def _hint(self, record: int) -> None:
        """Let the disk read while the threads decode. Chunks are asked for nearly in the order of their records."""
        if self._ahead is None:
            return
        with self._changed:
            first, last = max(self._hinted, record), record + _AHEAD_CHUNKS
            if last - first < _AHEAD_CHUNKS // 2:
                return
            self._hinted = last
        self._ahead.submit(functools.partial(self._reader.will_read, first, last - 1))

    def _load_chunk(self, record: int) -> None:
        try:
            self._hint(record)
            damage = self._load_chunk_into_place(record)
        except BaseException as error:  # reaches the taker, whatever it is
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            return
        with self._changed:
            if damage is not None:
                self._damage.append(damage)
            for number, *_ in self._by_record[record]:
                self._loading[number].missing -= 1
            self._changed.notify_all()

    def _load_chunk_into_place(self, record: int) -> Damage | None:
        started = time.perf_counter()
        reader, row = self._reader, self._reader.records[record]
        n_bytes = int(row["raw_bytes"])
        pieces = self._by_record[record]
        number, offset, position, length = pieces[0]
        if len(pieces) == 1 and length == n_bytes:
            out: U8 = self._loading[number].view[position : position + n_bytes]
            damage = reader.read_chunk(record, out, self._decoders)
        else:
            out, damage = self._whole_chunk(record, n_bytes)
            for number, offset, position, length in pieces:
                self._loading[number].view[position : position + length] = out[offset : offset + length]
        if damage is None:
            name = transform_of(row)
            stored = int(row["stored_bytes"])
            events.emit(
                events.ChunkLoaded(
                    source=reader.source.name,
                    record=record,
                    transform=name,
                    raw_bytes=n_bytes,
                    stored_bytes=stored,
                    seconds=time.perf_counter() - started,
                )
            )
        return damage

    def _whole_chunk(self, record: int, n_bytes: int) -> tuple[U8, Damage | None]:
        known = self._last_chunk.get(record) if self._last_chunk is not None else None
        if known is not None:
            return known, None
        out = np.empty(n_bytes, np.uint8)
        damage = self._reader.read_chunk(record, out, self._decoders)
        if self._last_chunk is not None and damage is None:
            self._last_chunk.put(record, out)
        return out, damage

    def _raise_all_damage(self) -> None:
        """What one chunk has shown calls for a look at all of them: the error lists everything that is lost."""
        if self._pool is not None:
            self._pool.close()
        found = set(self._damage)
        scratch = np.empty(4 << 20, np.uint8)
        for record in range(len(self._reader.records)):
            damage = self._reader.read_chunk(record, scratch[: int(self._reader.records["raw_bytes"][record])])
            if damage is not None:
                found.add(damage)
        raise CorruptCheckpointError(self._reader.source.name, sorted(found, key=lambda item: item.place))
