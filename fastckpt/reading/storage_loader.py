"""Loads storages from a container: several threads read, verify and decode them and put them in place, ahead of the unpickler.

    unpickler ── take(n) ──→ StorageLoader ── schedules ranges of chunks ──→ threads: read → crc → decode → digest → into the storage

Of files, a range is one native call, and the threads that decode read, too (`workers`). Of stores, many ranges are read ahead into buffers
(`range_reads`), and decoded there by as many threads at a time as decode.

Each chunk is decoded once, directly into the memory that the caller will own; only a chunk of several storages goes through a scratch
buffer. Chunks that are relative to others are decoded as soon as all rows of their chain have come (`chains`, `jobs`, `parking`). At most
`window_bytes` of storages that were not taken yet are in memory: no limit if storages stay in host memory anyway, a few storages if each
one goes on to a device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, NoReturn

import numpy as np
from torch.storage import UntypedStorage

from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, Damage, ObjectNotFoundError, StoreError, TooLargeError
from fastckpt.kernels import kernels
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.reading.chain_chunks import Allowance, ChainChunks
from fastckpt.reading.chains import Chain, Together, plan_chains
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.hedging import Hedging
from fastckpt.reading.jobs import Job, Jobs, plan_jobs, rows_needed
from fastckpt.reading.load_plan import LoadPlan
from fastckpt.reading.parking import Parking
from fastckpt.reading.places import LastChunk, Places
from fastckpt.reading.range_chunks import RangeChunks, Settled
from fastckpt.reading.range_reads import RangeReads
from fastckpt.reading.ranges import Range, limits_for, whole_files
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
        self._known = {} if last_chunk is None else last_chunk.known(self._plan.pieces)
        wanted_now = [chunk for chunk in self._plan.pieces if chunk not in self._known]
        work = _plan_work(reader, wanted_now, threads, reads, window_bytes)
        self._jobs = work.jobs
        self._window = Window(work.window_bytes, given or {})
        self._scheduled: set[int] = set()
        """Numbers of the jobs that were given to threads, or done."""
        self._next = 0
        """Number of storages of the plan's order that were scheduled ahead of the caller of `take`."""
        self._awaited = -1
        """Number of the storage that the caller of `take` waits for, or has waited for last."""
        self._damage: list[Damage] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        places = Places(reader, self._plan.pieces, self._window, last_chunk)
        chains = ChainChunks(places, work.chains, Allowance(work.reads.scratch_bytes))
        parking = Parking([job for job in work.jobs.all if isinstance(job, Range)], work.reads.parked_bytes)
        self._chunks = RangeChunks(places, chains, parking, threading.BoundedSemaphore(threads))
        self._pool = self._start(threads, work)

    def _start(self, threads: int, work: _Work) -> RangeReads | Workers | None:
        """Threads that do the jobs. None: the caller's own is enough, or the interpreter is ending and allows none."""
        waits = bool(work.reads.at_once)
        if len(work.jobs.all) <= 1 or (not waits and (threads == 1 or self._plan.n_bytes <= _INLINE_BYTES)):
            return None
        if not work.is_ahead:
            hint = functools.partial(read_soon, self._reader, work.chains) if waits else None
            workers = Workers(threads, self._do, hint)
            return None if workers.inline else workers
        return RangeReads(
            self._chunks.read,
            self._use,
            at_once=work.reads.at_once,
            buffers_bytes=work.reads.buffers_bytes,
            hedging=Hedging() if any(source.is_remote for source in work.sources) else None,
        )

    def __enter__(self) -> StorageLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()
        self._chunks.close()

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
        self._allocate([number])
        for chunk in self._plan.chunks[number]:
            if chunk in self._known:
                self._place_known(chunk)
            for at in self._jobs.of_chunk.get(chunk, ()):
                if at not in self._scheduled:
                    self._scheduled.add(at)
                    self._begin(at)

    def _begin(self, at: int) -> None:
        job = self._jobs.all[at]
        self._allocate(piece[0] for chunk in self._jobs.settles[at] for piece in self._plan.pieces[chunk])
        if self._pool is None:
            self._do(job)
        elif isinstance(self._pool, Workers):
            self._pool.submit(job)
        else:
            assert isinstance(job, Range)
            self._pool.submit(job)

    def _place_known(self, chunk: int) -> None:
        raw = self._known.pop(chunk)
        self._allocate(piece[0] for piece in self._plan.pieces[chunk])
        self._settle(functools.partial(self._chunks.place_known, chunk, raw))

    def _allocate(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not self._window.has_entered(number) and self.has_data(number):
                with self._changed:
                    self._window.enter(number, self._storages[number].n_bytes, len(self._plan.chunks[number]))

    def _do(self, job: Job) -> None:
        self._settle(functools.partial(self._chunks.load, job))

    def _use(self, range_: Range, found: U8 | BaseException) -> None:
        """Take a range that was read ahead, or the error of that."""
        if isinstance(found, (EOFError, ObjectNotFoundError)):
            self._settle(functools.partial(self._chunks.reread, range_))
        elif isinstance(found, BaseException):
            self._fail(found)
        else:
            self._settle(functools.partial(self._chunks.place, range_, found))

    def _settle(self, load: Callable[[], Settled]) -> None:
        try:
            settled = load()
        except BaseException as error:  # any error is raised by `take`
            self._fail(error)
            return
        with self._changed:
            self._damage += settled.damage
            for chunk in settled.chunks:
                for piece in self._plan.pieces[chunk]:
                    self._window.arrive(piece[0])
            # Whoever is woken takes the interpreter's lock only to sleep again, unless it is this that it waits for.
            if settled.damage or (self._awaited in self._window and self._window.is_whole(self._awaited)):
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
        records = self._reader.records
        scratch = np.empty(MAX_RAW_BYTES, np.uint8)
        for chunk in range(len(records)):  # bases too: of what needs them, only the first that is damaged is found
            damage = self._reader.read_chunk(chunk, scratch[: int(records["raw_bytes"][chunk])])
            found |= set() if damage is None else {damage}
        raise CorruptCheckpointError(self._reader.source.name, sorted(found, key=lambda item: item.place))


class _Work(NamedTuple):
    """What a load has to do, and how."""

    jobs: Jobs
    chains: Sequence[Chain]
    reads: Reads
    window_bytes: int | None
    is_ahead: bool
    """Stored bytes are read into buffers before they are decoded, because reads wait, and threads would."""
    sources: Sequence[Source]


def _plan_work(reader: Reader, wanted: Sequence[int], threads: int, reads: Reads, window_bytes: int | None) -> _Work:
    # A range or a chain begins all storages that it has chunks of.
    reach_bytes = None if window_bytes is None else max(window_bytes // 2, MAX_RAW_BYTES)
    together = Together() if reach_bytes is None else Together(reach_bytes=reach_bytes)
    chains = plan_chains(wanted, reader.records, together)
    rows = reader.records[rows_needed(wanted, chains)]
    sources = [reader.sources[file] for file in np.unique(rows["file"][rows["stored_bytes"] > 0]).tolist()]
    if chains:
        reads = reads.with_chains(has_window=window_bytes is not None)
        window_bytes = None if window_bytes is None else min(window_bytes, reads.window_bytes)
    reads = reads._replace(at_once=min(reads.at_once, _reads_at_once(sources)))
    are_files = kernels().read_chunks is not None and all(source.is_file for source in sources)
    if are_files:
        limits = whole_files(int(rows["raw_bytes"].sum(dtype=np.int64)), threads)
    else:
        at_once = reads.at_once or threads
        limits = limits_for(int(rows["stored_bytes"].sum(dtype=np.int64)), at_once, reads.buffers_bytes // at_once)
    if reach_bytes is not None:
        limits = limits._replace(reach_bytes=min(limits.reach_bytes, reach_bytes))
    is_ahead = bool(reads.at_once) and not are_files
    jobs = plan_jobs(wanted, chains, reader.records, limits, ahead=is_ahead)
    return _Work(jobs, chains, reads, window_bytes, is_ahead, sources)


def _reads_at_once(sources: Sequence[Source]) -> int:
    """How many reads of these are worth it at once; 0 if they do not wait."""
    if any(source.is_remote for source in sources):
        return max(source.reads_at_once() for source in sources if source.is_remote)
    most = 0
    for source in sources[:: max(1, len(sources) // _PROBED_FILES)]:
        with contextlib.suppress(StoreError):  # one that is missing is found when it is read
            most = max(most, source.reads_at_once())
    return most


__all__ = ["LastChunk", "StorageLoader", "check_size"]
