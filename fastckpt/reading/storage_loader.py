"""Loads storages from a container: several threads read, verify and decode them and put them in place, ahead of the unpickler.

    unpickler ── take(n) ──→ StorageLoader ── schedules ranges of chunks ──→ threads: read → crc → decode → digest → into the storage

Of files, a range is one native call, and the threads that decode read, too (`workers`). Of stores, many ranges are read ahead into buffers
(`range_reads`), and decoded there by as many threads at a time as decode.

Each chunk is decoded once, directly into the memory that the caller will own; only a chunk of several storages goes through a scratch
buffer. At most `window_bytes` of storages that were not taken yet are in memory: no limit if storages stay in host memory anyway, a few
storages if each one goes on to a device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NoReturn

import numpy as np
from torch.storage import UntypedStorage

from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, Damage, ObjectNotFoundError, StoreError, TooLargeError
from fastckpt.kernels import kernels
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.hedging import Hedging
from fastckpt.reading.load_plan import LoadPlan
from fastckpt.reading.range_chunks import LastChunk, RangeChunks
from fastckpt.reading.range_reads import RangeReads
from fastckpt.reading.ranges import Range, limits_for, plan, whole_files
from fastckpt.reading.reads import PLAIN_READS, Reads
from fastckpt.reading.sources import Source
from fastckpt.reading.window import Sink, Window
from fastckpt.reading.workers import Workers, read_soon

_INLINE_BYTES = 4 << 20  # for less, starting threads takes longer than the work
_PROBED_FILES = 4  # each takes some microseconds


def check_size(reader: Reader, needed_bytes: int, max_load_bytes: int) -> None:
    """TooLargeError if storages need more memory than is allowed. Called before anything is allocated."""
    if needed_bytes > max_load_bytes:
        raise TooLargeError(
            f"{reader.source.name} says that it holds {needed_bytes} bytes of tensors in a file of {reader.source.n_bytes}; at most "
            f"{max_load_bytes} may be allocated here. If you trust it, set FASTCKPT_MAX_LOAD_BYTES, or fetch single tensors "
            "with fastckpt.open"
        )


class StorageLoader:
    """A StorageProvider over a container. Use as a context manager; one thread takes, `threads` decode. Its 14 attributes: the plan, the
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
        reads: Reads = PLAIN_READS,
    ) -> None:
        """window_bytes: see the module; None: no limit. wanted: see `LoadPlan`. last_chunk: a cache of the caller, for small tensors.
        given: memory of the caller that storages are written into, by number, each as long as its storage; or sinks. reads: how many,
        where they wait.
        """
        self._reader = reader
        self._storages = reader.directory.storages
        self._plan = LoadPlan(reader, wanted)
        self._window = Window(window_bytes, given or {})
        self._scheduled: set[int] = set()
        """Numbers of the ranges that were given to threads, or loaded."""
        self._next = 0
        """Number of storages of the plan's order that were scheduled ahead of the caller of `take`."""
        self._awaited = -1
        """Number of the storage that the caller of `take` waits for, or has waited for last."""
        self._damage: list[Damage] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._chunks = RangeChunks(
            reader, self._plan.pieces, self._window, threading.BoundedSemaphore(threads), last_chunk
        )
        reads = reads._replace(at_once=min(reads.at_once, _reads_at_once(reader, self._plan)))
        self._ranges = _ranges_of(reader, self._plan, threads, reads, window_bytes)
        self._range_of = {chunk: number for number, range_ in enumerate(self._ranges) for chunk in range_.chunks}
        self._pool = self._start(threads, reads)

    def _start(self, threads: int, reads: Reads) -> RangeReads | Workers | None:
        """Threads that load ranges. None: the caller's own is enough, or the interpreter is ending and allows none."""
        waits = bool(reads.at_once)
        if len(self._ranges) <= 1 or (not waits and (threads == 1 or self._plan.n_bytes <= _INLINE_BYTES)):
            return None
        if not waits or _are_files(self._reader, self._plan):
            hint = functools.partial(read_soon, self._reader) if waits else None
            workers = Workers(threads, self._load, hint)
            return None if workers.inline else workers
        is_remote = any(source.is_remote for source in _sources_of(self._reader, self._plan))
        return RangeReads(
            self._chunks.read,
            self._use,
            at_once=reads.at_once,
            buffers_bytes=reads.buffers_bytes,
            hedging=Hedging() if is_remote else None,
        )

    def __enter__(self) -> StorageLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()

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
        if self._pool is None or self._next < len(self._plan.order):
            self._schedule_storage(number)
            self._schedule_ahead()
        with self._changed:
            self._awaited = number
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
            at = self._range_of[chunk]
            if at in self._scheduled:
                continue
            self._scheduled.add(at)
            for other in self._ranges[at].chunks:
                for piece in self._plan.pieces[other]:
                    self._allocate(piece[0])
            if self._pool is None:
                self._load(self._ranges[at])
            else:
                self._pool.submit(self._ranges[at])

    def _allocate(self, number: int) -> None:
        if not self._window.has_entered(number) and self.has_data(number):
            with self._changed:
                self._window.enter(number, self._storages[number].n_bytes, len(self._plan.chunks[number]))

    def _load(self, range_: Range) -> None:
        self._settle(range_, functools.partial(self._chunks.load, range_))

    def _use(self, range_: Range, found: U8 | BaseException) -> None:
        """Take a range that was read ahead, or the error of that."""
        if isinstance(found, (EOFError, ObjectNotFoundError)):
            self._settle(range_, functools.partial(self._chunks.reread, range_))
        elif isinstance(found, BaseException):
            self._fail(found)
        else:
            self._settle(range_, functools.partial(self._chunks.place, range_, found))

    def _settle(self, range_: Range, load: Callable[[], list[Damage]]) -> None:
        try:
            damage = load()
        except BaseException as error:  # any error is raised by `take`
            self._fail(error)
            return
        with self._changed:
            self._damage += damage
            for chunk in range_.chunks:
                for piece in self._plan.pieces[chunk]:
                    self._window.arrive(piece[0])
            # Whoever is woken takes the interpreter's lock only to sleep again, unless it is this that it waits for.
            if damage or (self._awaited in self._window and self._window.is_whole(self._awaited)):
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

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


def _sources_of(reader: Reader, loads: LoadPlan) -> list[Source]:
    """Where the stored bytes of a load are, in the order of the files."""
    chunks = reader.records[list(loads.pieces)]
    return [reader.sources[file] for file in np.unique(chunks["file"][chunks["stored_bytes"] > 0]).tolist()]


def _reads_at_once(reader: Reader, loads: LoadPlan) -> int:
    """How many reads of these are worth it at once; 0 if they do not wait."""
    sources = _sources_of(reader, loads)
    if any(source.is_remote for source in sources):
        return max(source.reads_at_once() for source in sources if source.is_remote)
    most = 0
    for source in sources[:: max(1, len(sources) // _PROBED_FILES)]:
        with contextlib.suppress(StoreError):  # one that is missing is found when it is read
            most = max(most, source.reads_at_once())
    return most


def _are_files(reader: Reader, loads: LoadPlan) -> bool:
    """Whether the native kernels can read all of these bytes by themselves."""
    return kernels().read_chunks is not None and all(source.is_file for source in _sources_of(reader, loads))


def _ranges_of(reader: Reader, loads: LoadPlan, threads: int, reads: Reads, window_bytes: int | None) -> list[Range]:
    if _are_files(reader, loads):
        limits = whole_files(loads.n_bytes, threads)
    else:
        chunks, at_once = reader.records[list(loads.pieces)], reads.at_once or threads
        limits = limits_for(int(chunks["stored_bytes"].sum()), at_once, reads.buffers_bytes // at_once)
    if window_bytes is not None:  # a range begins all storages that it has chunks of
        limits = limits._replace(reach_bytes=min(limits.reach_bytes, max(window_bytes // 2, MAX_RAW_BYTES)))
    return plan(loads.pieces, reader.records, limits)


__all__ = ["LastChunk", "StorageLoader", "check_size"]
