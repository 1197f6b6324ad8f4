"""The chunks of a range: stored bytes in a file or in memory → verified raw bytes in their places.

One native call reads, verifies and decodes all chunks of the range, outside the interpreter's lock. What it does not know (frames of other
writers), and every chunk with which something is wrong, goes through `Reader.read_chunk`, which says what is wrong. Chunks with bases go
through `chain_chunks`, as soon as all rows that they need have come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np

from fastckpt import events
from fastckpt._types import U8
from fastckpt.errors import Damage, ObjectNotFoundError
from fastckpt.kernels import kernels
from fastckpt.kernels.chunk_table import FOREIGN, OK, OUTCOME, can_be_read, table_of
from fastckpt.reading.chain_chunks import ChainChunks
from fastckpt.reading.jobs import Batch, Job
from fastckpt.reading.parking import Parking
from fastckpt.reading.places import Places, Room
from fastckpt.reading.ranges import Range

_NOTHING = np.empty(0, np.uint8)


class Settled(NamedTuple):
    """What a job has done."""

    chunks: Sequence[int]
    """Wanted chunks that are in place, or known to be damaged."""
    damage: Sequence[Damage]


class RangeChunks:
    """See the module. Any number of threads at once."""

    def __init__(
        self, places: Places, chains: ChainChunks, parking: Parking, decoders: AbstractContextManager[Any]
    ) -> None:
        """chains: that ranges and batches bring. parking: of the ranges that are read ahead. decoders: a context for the part that computes
        instead of waiting.
        """
        self._places, self._reader = places, places.reader
        self._chains, self._parking, self._decoders = chains, parking, decoders
        self._native = kernels().read_chunks
        self._own = threading.local()

    def load(self, job: Job) -> Settled:
        """Read a range or a batch, on this thread, and put its chunks in place. StoreError and OSError: it could not be read."""
        if isinstance(job, Batch):
            damage = [found for number in job.chains for found in self._chains.load(number, {})]
            return Settled([chunk for number in job.chains for chunk in self._chains.chains[number].wanted], damage)
        source = self._reader.sources[job.file]
        try:
            if job.start == job.stop:
                return self.place(job, _NOTHING)
            if source.is_file and self._native is not None and not job.parts:
                with self._chains.files.opened(job.file) as file:
                    return Settled(job.chunks, self._place(job, file, None))
            buffer = self._buffer(job.stop - job.start)
            self.read(job, buffer)
        except (EOFError, ObjectNotFoundError):
            return self.reread(job)
        return self.place(job, buffer)

    def close(self) -> None:
        """Let go of files. No thread reads any more."""
        self._chains.files.close()

    def place_known(self, chunk: int, raw: U8) -> Settled:
        """Put a chunk in place whose verified bytes the caller has kept."""
        self._places.spread(chunk, raw)
        return Settled([chunk], [])

    def read(self, range_: Range, out: U8) -> None:
        """Read the stored bytes of a range. EOFError, StoreError, OSError."""
        if out.size:
            self._reader.sources[range_.file].read_into(self._position(range_), out)

    def place(self, range_: Range, stored: U8) -> Settled:
        """Put the chunks of a range in place whose stored bytes have been read. Errors as those of `load`."""
        with self._decoders:
            damage = self._place(range_, -1, stored)
            views = {part.row: self._stored_of(part.row, range_, stored) for part in range_.parts}
            return self._with_chains(range_, views, damage)

    def reread(self, range_: Range) -> Settled:
        """Read the chunks of a range one by one, because reading them together has failed. As `load`, this raises and returns."""
        return self._with_chains(range_, {}, self._place(range_, None, None))

    def _with_chains(self, range_: Range, stored: Mapping[int, U8], damage: list[Damage]) -> Settled:
        """Put the chains in place, too, that are whole with this range."""
        chunks = list(range_.chunks)
        for number, brought in self._parking.bring(range_, stored).items() if range_.parts else ():
            damage += self._chains.load(number, brought)
            self._parking.forget(number)
            chunks += self._chains.chains[number].wanted
        return Settled(chunks, damage)

    def _stored_of(self, row: int, range_: Range, stored: U8) -> U8:
        record = self._reader.records[row]
        n_bytes = int(record["stored_bytes"])
        first = int(record["offset"]) - range_.start if n_bytes else 0
        return stored[first : first + n_bytes]

    def _place(self, range_: Range, file: int | None, stored: U8 | None) -> list[Damage]:
        """file: a descriptor; -1: they are in `stored`; None: nowhere yet."""
        if not range_.chunks:
            return []
        if not any(self._places.is_far(chunk) for chunk in range_.chunks):
            return self._place_in(range_, [self._places.room(chunk) for chunk in range_.chunks], file, stored)
        damage: list[Damage] = []
        # A sink has few rooms, and who waits for one must not hold another: one chunk after the other.
        for chunk in range_.chunks:
            with ExitStack() as held:
                room = self._places.far_room(chunk, held)
                damage += self._place_in(range_._replace(chunks=(chunk,)), [room], file, stored)
        return damage

    def _place_in(self, range_: Range, rooms: Sequence[Room], file: int | None, stored: U8 | None) -> list[Damage]:
        whole: set[int] = set()
        if self._native is not None and file is not None:
            step = 1 if events.enabled() else len(rooms)  # an event is emitted when its span ends
            for first in range(0, len(rooms), step):
                part = slice(first, first + step)
                found = self._together(range_._replace(chunks=range_.chunks[part]), rooms[part], file, stored)
                for chunk, room in zip(range_.chunks[part], rooms[part], strict=True):
                    if chunk in found:
                        self._places.settle(chunk, room, found[chunk])
                whole |= found.keys()
        damage = []
        for chunk, room in zip(range_.chunks, rooms, strict=True):
            problem = None if chunk in whole else self._alone(chunk, room, range_, stored)
            damage += [] if problem is None else [problem]
        return damage

    def _together(self, range_: Range, rooms: Sequence[Room], file: int, stored: U8 | None) -> dict[int, float]:
        """Read chunks by one native call. Returns those that are whole, and the seconds that each took."""
        native = self._native
        if native is None:  # since the call before this one; and another thread may find so during this one
            return {}
        records = self._reader.records[list(range_.chunks)]
        start = self._position(range_) - range_.start if stored is None else -range_.start
        offsets = records["offset"].astype(np.int64) + start
        table = table_of(records, offsets, [room.address for room in rooms], [room.is_fresh for room in rooms])
        readable = can_be_read(records)
        if not readable.all():
            table = table[readable]
        outcomes = np.zeros(len(table), OUTCOME)
        native(file, stored, table, outcomes)
        if len(outcomes) and (outcomes["status"] == FOREIGN).all():
            self._native = None  # of another writer, so the rest is, too
        whole = np.flatnonzero(readable)[outcomes["status"] == OK].tolist()
        spent = outcomes["seconds"][outcomes["status"] == OK].tolist()
        return {range_.chunks[at]: seconds for at, seconds in zip(whole, spent, strict=True)}

    def _alone(self, chunk: int, room: Room, range_: Range, stored: U8 | None) -> Damage | None:
        """Read one chunk: from the bytes that are there, and if these are not right, once more from its source."""
        began_s = time.perf_counter()
        damage: Damage | None = None
        if stored is not None:
            damage = self._reader.read_chunk(chunk, room.view, self._stored_of(chunk, range_, stored))
        if stored is None or damage is not None:
            damage = self._reader.read_chunk(chunk, room.view)
        if damage is None:
            self._places.settle(chunk, room, time.perf_counter() - began_s)
        return damage

    def _position(self, range_: Range) -> int:
        """Where a range begins in its source."""
        return range_.start if range_.file else self._reader.start + range_.start

    def _buffer(self, n_bytes: int) -> U8:
        """This thread's buffer for stored bytes: fresh pages for every range would cost as much as reading it."""
        buffer: U8 | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.size < n_bytes:
            buffer = self._own.buffer = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes]
