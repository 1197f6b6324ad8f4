"""Chains → verified raw bytes of their wanted chunks, in their places.

A row that is a base of another is decoded where that one belongs, and its digest is left to the last row's. What the native kernels cannot
do, and every chain with which something is wrong, goes through `Reader.read_chain`, which says what is wrong.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from fastckpt._types import U8
from fastckpt.errors import Damage, ObjectNotFoundError
from fastckpt.kernels import kernels
from fastckpt.kernels.chunk_table import OK, OUTCOME, Table, can_be_read, table_of
from fastckpt.reading.chain_rooms import ChainRooms
from fastckpt.reading.chains import Chain
from fastckpt.reading.chunk_reader import position_of
from fastckpt.reading.open_files import OpenFiles
from fastckpt.reading.places import Places, Room, new_room

_NOTHING = np.empty(0, np.uint8)
_MEMORY = -1


class Allowance:
    """Memory that threads share: each waits until there is room for what it takes, or until nobody else has taken any."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, n_bytes: int) -> Iterator[None]:
        """Context in which memory may be taken. Whoever has it must wait for nobody who may wait for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held_bytes or self._held_bytes + n_bytes <= self._limit_bytes)
            self._held_bytes += n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= n_bytes
                self._changed.notify_all()


class _Stored(NamedTuple):
    """Where the stored bytes of a row lie."""

    file: int
    """A descriptor; _MEMORY: they are in `memory`."""
    memory: U8 | None
    offset: int

    def is_beside(self, other: _Stored) -> bool:
        """Whether one call can read both."""
        return self.file == other.file and self.memory is other.memory


class ChainChunks:
    """See the module. Any number of threads at once."""

    def __init__(self, places: Places, chains: Sequence[Chain], scratch: Allowance) -> None:
        """scratch: for what has no place in the loaded state."""
        self.chains = chains
        self.files = OpenFiles(places.reader.sources)
        """Of the load. To be closed when no thread reads any more."""
        self._places, self._reader, self._scratch = places, places.reader, scratch
        self._native = kernels().read_chunks

    def load(self, number: int, stored: Mapping[int, U8]) -> list[Damage]:
        """Put the wanted chunks of a chain in place. Returns the damage of the first row that has any.

        stored: stored bytes of its rows; those that are missing here are read. StoreError, OSError: they could not be.
        """
        chain = self.chains[number]
        began_s = time.perf_counter()
        is_far = any(self._places.is_far(chunk) for chunk in chain.wanted)
        # A sink has few rooms, and who waits for one must not hold another: only a single chunk is decoded in one.
        apart = is_far and len(chain.wanted) > 1
        raw_bytes = self._reader.records["raw_bytes"]
        beside = sum(int(raw_bytes[chunk]) for chunk in chain.wanted) if apart else 0
        with self._scratch.held(chain.scratch_bytes + beside), ExitStack() as held:
            if apart:
                rooms = {chunk: new_room(int(raw_bytes[chunk])) for chunk in chain.wanted}
            elif is_far:
                rooms = {chunk: self._places.far_room(chunk, held) for chunk in chain.wanted}
            else:
                rooms = {chunk: self._places.room(chunk) for chunk in chain.wanted}
            damage = self._decode(chain, rooms, stored)
            if damage is None:
                for chunk, room in rooms.items():
                    self._places.settle(chunk, room, (time.perf_counter() - began_s) / len(rooms))
        return [] if damage is None else [damage]

    def _decode(self, chain: Chain, rooms: Mapping[int, Room], stored: Mapping[int, U8]) -> Damage | None:
        with contextlib.suppress(EOFError, ObjectNotFoundError):  # named below
            if self._natively(chain, rooms, stored):
                return None
        views = {chunk: room.view for chunk, room in rooms.items()}
        if stored and self._reader.read_chain(chain, views, stored) is None:
            return None
        return self._reader.read_chain(chain, views, {})  # what came wrong is asked for once more

    def _natively(self, chain: Chain, rooms: Mapping[int, Room], stored: Mapping[int, U8]) -> bool:
        """Whether the native kernels have decoded all rows, and found them right."""
        records = self._reader.records[[link.row for link in chain.links]]
        if self._native is None or not can_be_read(records).all():
            return False
        memory = ChainRooms(chain, self._reader.records, {chunk: room.view for chunk, room in rooms.items()})
        table = table_of(records, 0, 0, False)
        with ExitStack() as files:
            opened: dict[int, int] = {}
            begun, bases, source = 0, [], _Stored(_MEMORY, None, 0)
            for at, link in enumerate(chain.links):
                lies = self._lies(link.row, stored, opened, files)
                is_joined = link.base is not None and memory.is_joined(link.base)
                if is_joined or (lies is not None and not lies.is_beside(source)):
                    if not self._call(source, table[begun:at]):
                        return False
                    begun = at
                source = source if lies is None else lies
                base = memory.base(link)
                bases.append(base)  # alive until it is used
                row = table[at]
                row["offset"] = source.offset if lies is not None else 0
                row["raw"] = _address(memory.out(link))
                row["base"] = 0 if base is None else _address(base)
                row["is_base"] = link.row not in rooms
                row["is_fresh"] = link.is_first and link.room in rooms and rooms[link.room].is_fresh
                if link.frees:
                    if not self._call(source, table[begun : at + 1]):
                        return False
                    begun = at + 1
                    bases.clear()
                    memory.free(link)
            return self._call(source, table[begun:])

    def _call(self, source: _Stored, table: Table) -> bool:
        if not len(table):
            return True
        assert self._native is not None
        outcomes = np.zeros(len(table), OUTCOME)
        memory = None if source.file != _MEMORY else _NOTHING if source.memory is None else source.memory
        self._native(source.file, memory, table, outcomes)
        return bool((outcomes["status"] == OK).all())

    def _lies(self, row: int, stored: Mapping[int, U8], opened: dict[int, int], files: ExitStack) -> _Stored | None:
        """Where a row's stored bytes are, read if that is nowhere yet. None: it has none. EOFError, StoreError, OSError."""
        record = self._reader.records[row]
        n_bytes = int(record["stored_bytes"])
        if not n_bytes:
            return None
        if row in stored:
            return _Stored(_MEMORY, stored[row], 0)
        number = int(record["file"])
        source, offset = self._reader.sources[number], position_of(self._reader, record)
        if source.is_file:
            if number not in opened:
                opened[number] = files.enter_context(self.files.opened(number))
            return _Stored(opened[number], None, offset)
        data = np.empty(n_bytes, np.uint8)
        source.read_into(offset, data)
        return _Stored(_MEMORY, data, 0)


def _address(view: U8) -> int:
    address: int = view.__array_interface__["data"][0]
    return address
