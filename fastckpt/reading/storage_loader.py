"""Loads storages from a container: several threads read, verify and decode them and put them in place, ahead of the unpickler.

    unpickler ── take(n) ──→ StorageLoader ── schedules chunks ──→ threads: read → crc → decode → digest → into the storage

Each chunk is decoded once, directly into the memory that the caller will own; only a chunk of several storages goes through a scratch
buffer. At most `window_bytes` of storages that were not taken yet are in memory: no limit if storages stay in host memory anyway, a few
storages if each one goes on to a device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn, Protocol

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
from fastckpt.reading.load_plan import LoadPlan

# Enough chunks ahead to keep 16 threads busy while a storage is copied to a device.
DEVICE_WINDOW_BYTES = 256 << 20
_ALIGNMENT_BYTES = 64
_MAPPED_BYTES = 1 << 20
_AHEAD_CHUNKS = 32  # up to 64 MiB
# Additional threads that wait for the disk while the others decode: 505 MB that are not cached take 0.48 s instead of 0.55, on two cores.
# The number of threads that decode at once stays the same. For cached files they would cost 4 %, so they are not started then.
_WAITING_THREADS = 2
_INLINE_BYTES = 4 << 20  # for less, starting threads takes longer than the work


def check_size(reader: Reader, needed_bytes: int, max_load_bytes: int) -> None:
    """TooLargeError if storages need more memory than is allowed. Called before anything is allocated."""
    if needed_bytes > max_load_bytes:
        raise TooLargeError(
            f"{reader.source.name} says that it holds {needed_bytes} bytes of tensors in a file of {reader.source.n_bytes}; at most "
            f"{max_load_bytes} may be allocated here. If you trust it, set FASTCKPT_MAX_LOAD_BYTES, or fetch single tensors "
            "with fastckpt.open"
        )


def _new_memory(n_bytes: int) -> U8:
    """New memory for one storage, aligned as torch aligns its own."""
    if n_bytes >= _MAPPED_BYTES:
        return fresh_pages(n_bytes)
    room = np.empty(n_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -room.__array_interface__["data"][0] % _ALIGNMENT_BYTES
    return room[start : start + n_bytes]


def _pool(threads: int, name: str) -> WorkerPool | None:
    """Start threads. None if the interpreter is ending and allows none: then nothing is read ahead of the unpickler."""
    pool = WorkerPool(threads, name)
    return None if pool.inline else pool


class Sink(Protocol):
    """Takes the bytes of a storage that lies out of the threads' reach, such as on a device. Any thread, several at once."""

    def room(self, position: int, n_bytes: int) -> contextlib.AbstractContextManager[U8]:
        """Context with host memory for these bytes of the storage; at its end they are on their way. It may wait for memory."""


class _Loading:
    """A storage in flight: its memory, and the number of chunks that are still missing."""

    def __init__(self, n_bytes: int, missing: int, given: U8 | Sink | None) -> None:
        # NumPy's memory: a storage over it cannot be resized, like torch.load's. A resizable storage would let a hostile skeleton ask for a
        # tensor past its end, and read whatever fresh memory holds.
        self.view = _new_memory(n_bytes) if given is None else given
        self.storage = (
            torch.from_numpy(self.view).untyped_storage() if isinstance(self.view, np.ndarray) else UntypedStorage(0)
        )
        self.missing = missing


class _Window:
    """The storages in memory that were not taken yet. Under the loader's lock, except for `view`."""

    def __init__(self, limit_bytes: int | None, given: Mapping[int, U8 | Sink]) -> None:
        """limit_bytes: the window is full from this size on; None: never. given: memory of the caller, or sinks, by number of storage."""
        self._limit_bytes = limit_bytes
        self._given = given
        self._held_bytes = 0
        self._loading: dict[int, _Loading] = {}
        self._entered: set[int] = set()
        """Storages that have been given memory; each gets it only once."""

    @property
    def is_full(self) -> bool:
        """Whether storages that nobody waits for should stay out."""
        return self._limit_bytes is not None and self._held_bytes >= self._limit_bytes

    def enter(self, number: int, n_bytes: int, n_chunks: int) -> None:
        """Give a storage its memory, unless it has had it. n_chunks: number of chunks that have to arrive."""
        if number not in self._entered:
            self._entered.add(number)
            self._loading[number] = _Loading(n_bytes, n_chunks, self._given.get(number))
            self._held_bytes += n_bytes

    def room(self, number: int, position: int, n_bytes: int) -> contextlib.AbstractContextManager[U8]:
        """Context with the memory for some bytes of a storage in the window. Any thread."""
        view = self._loading[number].view
        if isinstance(view, np.ndarray):
            return contextlib.nullcontext(view[position : position + n_bytes])
        return view.room(position, n_bytes)

    def arrive(self, number: int) -> None:
        """One chunk of a storage is in place, or is known to be damaged."""
        self._loading[number].missing -= 1

    def __contains__(self, number: int) -> bool:
        """Whether a storage is in the window."""
        return number in self._loading

    def is_whole(self, number: int) -> bool:
        """Whether a storage has all its chunks. KeyError unless it is in the window."""
        return not self._loading[number].missing

    def take(self, number: int) -> UntypedStorage:
        """Take a storage out of the window."""
        storage = self._loading.pop(number).storage
        self._held_bytes -= storage.nbytes()
        return storage


class _Prefetcher:
    """Makes the disk read ahead of the decoding threads. It has a thread of its own, because the system call blocks as long as the disk is
    busy. Any thread.
    """

    def __init__(self, reader: Reader, thread: WorkerPool) -> None:
        """thread: closed with this object."""
        self._reader, self._thread = reader, thread
        self._lock = threading.Lock()
        self._asked_for = 0
        """The chunks below this number have been asked for."""

    def reach(self, chunk: int) -> None:
        """A chunk is being read: prefetch the chunks after it. Chunks are read nearly in the order of their numbers."""
        with self._lock:
            first, end = max(self._asked_for, chunk), chunk + _AHEAD_CHUNKS
            if end - first < _AHEAD_CHUNKS // 2:
                return
            self._asked_for = end
        self._thread.submit(functools.partial(self._reader.prefetch, first, end - 1))

    def close(self) -> None:
        """Stop prefetching."""
        self._thread.close()


class LastChunk:
    """Keeps the chunk that was last decoded for only a part of it: a caller that fetches small tensors one by one finds the next one
    there.
    """

    def __init__(self) -> None:
        self._held: tuple[int, U8] | None = None

    def get(self, chunk: int) -> U8 | None:
        """The raw bytes of a chunk, if it is the kept one. Any thread."""
        held = self._held
        return held[1] if held is not None and held[0] == chunk else None

    def put(self, chunk: int, raw: U8) -> None:
        """Keep the verified bytes of a chunk in place of the previous one. Any thread."""
        self._held = (chunk, raw)

    def release(self) -> None:
        """Drop the kept chunk."""
        self._held = None


class StorageLoader:
    """A StorageProvider over a container. Use as a context manager; one thread takes, `threads` decode. Its 13 attributes: the plan, the
    data that the threads share under one lock, and the threads.
    """

    def __init__(
        self,
        reader: Reader,
        threads: int,
        window_bytes: int | None,
        wanted: Sequence[int] | None = None,
        last_chunk: LastChunk | None = None,
        given: Mapping[int, U8 | Sink] | None = None,
    ) -> None:
        """window_bytes: see the module; None: no limit. wanted: see `LoadPlan`. last_chunk: a cache of the caller, for small tensors.
        given: memory of the caller that storages are written into, by number, each as long as its storage; or sinks.
        """
        self._reader = reader
        self._storages = reader.directory.storages
        self._plan = LoadPlan(reader, wanted)
        self._window = _Window(window_bytes, given or {})
        self._last_chunk = last_chunk
        self._scheduled: set[int] = set()
        """Numbers of the chunks that were given to threads, or loaded."""
        self._next = 0
        """Number of storages of the plan's order that were scheduled ahead of the caller of `take`."""
        self._damage: list[Damage] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._decoders = threading.BoundedSemaphore(threads)
        inline = self._plan.n_bytes <= _INLINE_BYTES or threads == 1
        waits = not inline and reader.source.is_cold()
        self._pool = None if inline else _pool(threads + waits * _WAITING_THREADS, "fastckpt-load")
        ahead = _pool(1, "fastckpt-read") if waits and self._pool is not None else None
        self._prefetcher = None if ahead is None else _Prefetcher(reader, ahead)

    def __enter__(self) -> StorageLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in (self._pool, self._prefetcher):
            if one is not None:
                one.close()

    def n_bytes(self, number: int) -> int | None:
        return self._storages[number].n_bytes if number < len(self._storages) else None

    def has_data(self, number: int) -> bool:
        return self._storages[number].extents is not None

    def take(self, number: int) -> UntypedStorage:
        """The storage, complete and verified. CorruptCheckpointError lists all damage of the whole container."""
        alone = self._pool is None and not self._damage and self._error is None
        if alone and number in self._window and self._window.is_whole(number):
            # Already read on this thread, as part of a bundle: no synchronisation with other threads is needed.
            return self._window.take(number)
        self._schedule_storage(number)
        self._schedule_ahead()
        with self._changed:
            self._changed.wait_for(lambda: self._window.is_whole(number) or self._damage or self._error)
            if self._error is not None:
                raise self._error
            storage = None if self._damage else self._window.take(number)
        if storage is None:
            self._raise_all_damage()
        self._schedule_ahead()
        return storage

    def _schedule_ahead(self) -> None:
        if self._pool is None:
            return
        order = self._plan.order
        while self._next < len(order) and not self._window.is_full:
            self._schedule_storage(order[self._next])
            self._next += 1

    def _schedule_storage(self, number: int) -> None:
        self._allocate(number)
        for chunk in self._plan.chunks[number]:
            if chunk in self._scheduled:
                continue
            self._scheduled.add(chunk)
            for other, *_ in self._plan.pieces[chunk]:
                self._allocate(other)
            if self._pool is None:
                self._load_chunk(chunk)
            else:
                self._pool.submit(functools.partial(self._load_chunk, chunk))

    def _allocate(self, number: int) -> None:
        if self.has_data(number):
            with self._changed:
                self._window.enter(number, self._storages[number].n_bytes, len(self._plan.chunks[number]))

    def _load_chunk(self, chunk: int) -> None:
        try:
            if self._prefetcher is not None:
                self._prefetcher.reach(chunk)
            damage = self._load_chunk_into_place(chunk)
        except BaseException as error:  # any error is raised by `take`
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            return
        with self._changed:
            if damage is not None:
                self._damage.append(damage)
            for number, *_ in self._plan.pieces[chunk]:
                self._window.arrive(number)
            self._changed.notify_all()

    def _load_chunk_into_place(self, chunk: int) -> Damage | None:
        started = time.perf_counter()
        reader, record = self._reader, self._reader.records[chunk]
        n_bytes = int(record["raw_bytes"])
        pieces = self._plan.pieces[chunk]
        number, offset, position, length = pieces[0]
        if len(pieces) == 1 and length == n_bytes:
            with self._window.room(number, position, n_bytes) as out:
                damage = reader.read_chunk(chunk, out, self._decoders)
        else:
            whole, damage = self._whole_chunk(chunk, n_bytes)
            for number, offset, position, length in pieces:
                with self._window.room(number, position, length) as place:
                    place[:] = whole[offset : offset + length]
        if damage is None:
            name = transform_of(record)
            stored = int(record["stored_bytes"])
            events.emit(
                events.ChunkLoaded(
                    source=reader.source.name,
                    record=chunk,
                    transform=name,
                    raw_bytes=n_bytes,
                    stored_bytes=stored,
                    seconds=time.perf_counter() - started,
                )
            )
        return damage

    def _whole_chunk(self, chunk: int, n_bytes: int) -> tuple[U8, Damage | None]:
        known = self._last_chunk.get(chunk) if self._last_chunk is not None else None
        if known is not None:
            return known, None
        out = np.empty(n_bytes, np.uint8)
        damage = self._reader.read_chunk(chunk, out, self._decoders)
        if self._last_chunk is not None and damage is None:
            self._last_chunk.put(chunk, out)
        return out, damage

    def _raise_all_damage(self) -> NoReturn:
        """Read all chunks, because one of them is damaged: the error lists all losses."""
        if self._pool is not None:
            self._pool.close()
        found = set(self._damage)
        scratch = np.empty(4 << 20, np.uint8)
        for chunk in range(len(self._reader.records)):
            damage = self._reader.read_chunk(chunk, scratch[: int(self._reader.records["raw_bytes"][chunk])])
            if damage is not None:
                found.add(damage)
        raise CorruptCheckpointError(self._reader.source.name, sorted(found, key=lambda item: item.place))
