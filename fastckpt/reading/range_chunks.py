"""The chunks of a range: stored bytes in a file or in memory → verified raw bytes in their places.

One native call reads, verifies and decodes all chunks of the range, outside the interpreter's lock. What it does not know (deltas, frames
of other writers), and every chunk with which something is wrong, goes through `Reader.read_chunk`, which says what is wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastckpt import events
from fastckpt._types import U8
from fastckpt.errors import Damage, ObjectNotFoundError
from fastckpt.format.records import transform_of
from fastckpt.kernels import kernels
from fastckpt.kernels.chunk_table import OUTCOME, can_be_read, table_of
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.load_plan import Piece
from fastckpt.reading.ranges import Range
from fastckpt.reading.window import Sink

_NOTHING = np.empty(0, np.uint8)
_FOREIGN = 6  # FASTCKPT_FOREIGN


class Memory(Protocol):
    """Where a storage's bytes belong."""

    view: U8
    address: int
    is_fresh: bool
    sink: Sink | None


class Memories(Protocol):
    """The storages that are being loaded."""

    def loading(self, number: int) -> Memory:
        """The memory of one. Any thread."""


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


class _Room(NamedTuple):
    """Where the raw bytes of a chunk go first."""

    view: U8
    address: int
    is_fresh: bool
    is_shared: bool
    """Not their place: they are copied from here to several, or a part of them is."""


class RangeChunks:
    """See the module. Any number of threads at once."""

    def __init__(
        self,
        reader: Reader,
        pieces: Mapping[int, Sequence[Piece]],
        memories: Memories,
        decoders: AbstractContextManager[Any],
        last_chunk: LastChunk | None,
    ) -> None:
        """pieces: of each chunk. decoders: a context for the part that computes instead of waiting. last_chunk: of the caller."""
        self._reader, self._pieces, self._memories = reader, pieces, memories
        self._decoders, self._last_chunk = decoders, last_chunk
        self._native = kernels().read_chunks
        self._own = threading.local()

    def load(self, range_: Range) -> list[Damage]:
        """Read a range, on this thread, and put its chunks in place. Returns the damage of those that could not be.

        StoreError and OSError: it could not be read.
        """
        known = self._place_known(range_)
        range_ = range_._replace(chunks=tuple(chunk for chunk in range_.chunks if chunk not in known))
        if not range_.chunks:
            return []
        source = self._reader.sources[range_.file]
        try:
            if range_.start == range_.stop:
                return self.place(range_, _NOTHING)
            if source.is_file and self._native is not None:
                with source.opened() as file:
                    return self._place(range_, file, None)
            buffer = self._buffer(range_.stop - range_.start)
            self.read(range_, buffer)
        except (EOFError, ObjectNotFoundError):
            return self.reread(range_)
        return self.place(range_, buffer)

    def read(self, range_: Range, out: U8) -> None:
        """Read the stored bytes of a range. EOFError, StoreError, OSError."""
        if out.size:
            self._reader.sources[range_.file].read_into(self._position(range_), out)

    def place(self, range_: Range, stored: U8) -> list[Damage]:
        """Put the chunks of a range in place whose stored bytes have been read. Returns the damage, as `load`."""
        with self._decoders:
            return self._place(range_, -1, stored)

    def reread(self, range_: Range) -> list[Damage]:
        """Read the chunks of a range one by one, because reading them together has failed. As `load`, this raises and returns."""
        return self._place(range_, None, None)

    def _place(self, range_: Range, file: int | None, stored: U8 | None) -> list[Damage]:
        """file: a descriptor; -1: they are in `stored`; None: nowhere yet."""
        if not any(self._is_far(chunk) for chunk in range_.chunks):
            return self._place_in(range_, [self._room(chunk) for chunk in range_.chunks], file, stored)
        damage = []
        # A sink has few rooms, and who waits for one must not hold another: one chunk after the other.
        for chunk in range_.chunks:
            with ExitStack() as held:
                damage += self._place_in(range_._replace(chunks=(chunk,)), [self._far_room(chunk, held)], file, stored)
        return damage

    def _place_in(self, range_: Range, rooms: Sequence[_Room], file: int | None, stored: U8 | None) -> list[Damage]:
        whole: set[int] = set()
        if self._native is not None and file is not None:
            step = 1 if events.enabled() else len(rooms)  # an event is emitted when its span ends
            for first in range(0, len(rooms), step):
                part = slice(first, first + step)
                found = self._together(range_._replace(chunks=range_.chunks[part]), rooms[part], file, stored)
                for chunk, room in zip(range_.chunks[part], rooms[part], strict=True):
                    if chunk in found:
                        self._settle(chunk, room, found[chunk])
                whole |= found.keys()
        damage = []
        for chunk, room in zip(range_.chunks, rooms, strict=True):
            problem = None if chunk in whole else self._alone(chunk, room, range_, stored)
            damage += [] if problem is None else [problem]
        return damage

    def _together(self, range_: Range, rooms: Sequence[_Room], file: int, stored: U8 | None) -> dict[int, float]:
        """Read chunks by one native call. Returns those that are whole, and the seconds that each took."""
        if self._native is None:  # since the call before this one
            return {}
        records = self._reader.records[list(range_.chunks)]
        start = self._position(range_) - range_.start if stored is None else -range_.start
        offsets = records["offset"].astype(np.int64) + start
        table = table_of(records, offsets, [room.address for room in rooms], [room.is_fresh for room in rooms])
        readable = can_be_read(records)
        if not readable.all():
            table = table[readable]
        outcomes = np.zeros(len(table), OUTCOME)
        self._native(file, stored, table, outcomes)
        if len(outcomes) and (outcomes["status"] == _FOREIGN).all():
            self._native = None  # of another writer, so the rest is, too
        whole = np.flatnonzero(readable)[outcomes["status"] == 0].tolist()
        spent = outcomes["seconds"][outcomes["status"] == 0].tolist()
        return {range_.chunks[at]: seconds for at, seconds in zip(whole, spent, strict=True)}

    def _alone(self, chunk: int, room: _Room, range_: Range, stored: U8 | None) -> Damage | None:
        """Read one chunk: from the bytes that are there, and if these are not right, once more from its source."""
        began_s = time.perf_counter()
        damage: Damage | None = None
        if stored is not None:
            record = self._reader.records[chunk]
            n_bytes = int(record["stored_bytes"])
            first = int(record["offset"]) - range_.start if n_bytes else 0
            damage = self._reader.read_chunk(chunk, room.view, stored[first : first + n_bytes])
        if stored is None or damage is not None:
            damage = self._reader.read_chunk(chunk, room.view)
        if damage is None:
            self._settle(chunk, room, time.perf_counter() - began_s)
        return damage

    def _settle(self, chunk: int, room: _Room, seconds: float) -> None:
        """Copy what several storages share of a chunk that is whole, and tell of it."""
        if room.is_shared:
            self._spread(chunk, room.view)
            if self._last_chunk is not None:
                self._last_chunk.put(chunk, room.view)
        if events.enabled():
            record = self._reader.records[chunk]
            events.emit(
                events.ChunkLoaded(
                    source=self._reader.source.name,
                    record=chunk,
                    transform=transform_of(record),
                    raw_bytes=int(record["raw_bytes"]),
                    stored_bytes=int(record["stored_bytes"]),
                    seconds=seconds,
                )
            )

    def _room(self, chunk: int) -> _Room:
        n_bytes = int(self._reader.records["raw_bytes"][chunk])
        pieces = self._pieces[chunk]
        number, _, position, length = pieces[0]
        if len(pieces) == 1 and length == n_bytes:
            memory = self._memories.loading(number)
            view = memory.view[position : position + n_bytes]
            return _Room(view, memory.address + position, memory.is_fresh, False)
        view = np.empty(n_bytes, np.uint8)
        return _Room(view, view.__array_interface__["data"][0], False, True)

    def _is_far(self, chunk: int) -> bool:
        return self._memories.loading(self._pieces[chunk][0][0]).sink is not None

    def _far_room(self, chunk: int, held: ExitStack) -> _Room:
        """As `_room`; what has to be given back is added to `held`."""
        n_bytes = int(self._reader.records["raw_bytes"][chunk])
        number, _, position, length = self._pieces[chunk][0]
        sink = self._memories.loading(number).sink
        if sink is None or len(self._pieces[chunk]) > 1 or length != n_bytes:
            return self._room(chunk)
        view = held.enter_context(sink.room(position, n_bytes))
        return _Room(view, view.__array_interface__["data"][0], False, False)

    def _spread(self, chunk: int, raw: U8) -> None:
        for number, offset, position, length in self._pieces[chunk]:
            memory = self._memories.loading(number)
            if memory.sink is None:
                memory.view[position : position + length] = raw[offset : offset + length]
            else:
                with memory.sink.room(position, length) as place:
                    place[:] = raw[offset : offset + length]

    def _place_known(self, range_: Range) -> set[int]:
        """Put chunks in place that the caller has kept. Returns them."""
        found = set()
        for chunk in range_.chunks if self._last_chunk is not None else ():
            known = self._last_chunk.get(chunk) if self._last_chunk is not None else None
            if known is not None:
                self._spread(chunk, known)
                found.add(chunk)
        return found

    def _position(self, range_: Range) -> int:
        """Where a range begins in its source."""
        return range_.start if range_.file else self._reader.start + range_.start

    def _buffer(self, n_bytes: int) -> U8:
        """This thread's buffer for stored bytes: fresh pages for every range would cost as much as reading it."""
        buffer: U8 | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.size < n_bytes:
            buffer = self._own.buffer = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes]
