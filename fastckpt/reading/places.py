"""Where the raw bytes of wanted chunks belong: in the memory of storages, on a device, or in several storages, each with a part."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import numpy as np

from fastckpt import events
from fastckpt._types import U8
from fastckpt.format.records import transform_of
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.load_plan import Piece
from fastckpt.reading.window import Sink


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
        self._kept: tuple[int, U8] | None = None

    def known(self, chunks: Container[int]) -> dict[int, U8]:
        """The kept one, if it is one of these."""
        return {self._kept[0]: self._kept[1]} if self._kept is not None and self._kept[0] in chunks else {}

    def put(self, chunk: int, raw: U8) -> None:
        """Keep the verified bytes of a chunk in place of the previous one. Any thread."""
        self._kept = (chunk, raw)

    def release(self) -> None:
        """Drop the kept chunk."""
        self._kept = None


class Room(NamedTuple):
    """Where the raw bytes of a chunk go first."""

    view: U8
    address: int
    is_fresh: bool
    is_shared: bool
    """Not their place: they are copied from here to several, or a part of them is."""


def new_room(n_bytes: int) -> Room:
    """Memory of its own."""
    view = np.empty(n_bytes, np.uint8)
    return Room(view, view.__array_interface__["data"][0], False, True)


class Places:
    """See the module. Any number of threads at once."""

    def __init__(
        self,
        reader: Reader,
        pieces: Mapping[int, Sequence[Piece]],
        memories: Memories,
        last_chunk: LastChunk | None,
    ) -> None:
        """pieces: of each chunk. last_chunk: of the caller."""
        self.reader = reader
        self._pieces, self._memories, self._last_chunk = pieces, memories, last_chunk

    def room(self, chunk: int) -> Room:
        """Where a chunk goes first. Not for one that is `is_far`: see `far_room`."""
        n_bytes = int(self.reader.records["raw_bytes"][chunk])
        if not self._has_one_place(chunk):
            return new_room(n_bytes)
        number, _, position, _ = self._pieces[chunk][0]
        memory = self._memories.loading(number)
        view = memory.view[position : position + n_bytes]
        return Room(view, memory.address + position, memory.is_fresh, False)

    def _has_one_place(self, chunk: int) -> bool:
        pieces = self._pieces[chunk]
        return len(pieces) == 1 and pieces[0][3] == int(self.reader.records["raw_bytes"][chunk])

    def is_far(self, chunk: int) -> bool:
        """Whether a chunk goes to where threads cannot write, such as to a device."""
        return self._memories.loading(self._pieces[chunk][0][0]).sink is not None

    def far_room(self, chunk: int, held: ExitStack) -> Room:
        """As `room`; what has to be given back is added to `held`. Whoever waits here must hold no such room."""
        n_bytes = int(self.reader.records["raw_bytes"][chunk])
        number, _, position, _ = self._pieces[chunk][0]
        sink = self._memories.loading(number).sink
        if sink is None or not self._has_one_place(chunk):
            return self.room(chunk)
        view = held.enter_context(sink.room(position, n_bytes))
        return Room(view, view.__array_interface__["data"][0], False, False)

    def settle(self, chunk: int, room: Room, seconds: float) -> None:
        """Copy what several storages share of a chunk that is whole, and tell of it."""
        if room.is_shared:
            self.spread(chunk, room.view)
            if self._last_chunk is not None:
                self._last_chunk.put(chunk, room.view)
        if events.enabled():
            record = self.reader.records[chunk]
            events.emit(
                events.ChunkLoaded(
                    source=self.reader.source.name,
                    record=chunk,
                    transform=transform_of(record),
                    raw_bytes=int(record["raw_bytes"]),
                    stored_bytes=int(record["stored_bytes"]),
                    seconds=seconds,
                )
            )

    def spread(self, chunk: int, raw: U8) -> None:
        """Copy a chunk to all its places."""
        for number, offset, position, length in self._pieces[chunk]:
            memory = self._memories.loading(number)
            if memory.sink is None:
                memory.view[position : position + length] = raw[offset : offset + length]
            else:
                with memory.sink.room(position, length) as place:
                    place[:] = raw[offset : offset + length]
