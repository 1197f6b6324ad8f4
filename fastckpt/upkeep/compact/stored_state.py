"""A stored index as a sealed state: its chunks, decoded and verified ahead of whoever encodes them again.

    vote ─→ rows that storages use ─→ read, checked and decoded by threads, a few ahead ─→ chunks ─→ writing

Rows that are only bases of others are left out. No object is unpickled, and torch is not needed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError
from fastckpt.format.directory import Extent, StorageEntry
from fastckpt.format.element_types import ElementType, element_type
from fastckpt.format.sealed_state import SealedChunk, SealedState
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader

_BYTES_OF_ONE = 4 * MAX_RAW_BYTES
"""Memory for a chunk that is read ahead: itself, its stored bytes, and a base with the base's own."""
_OF_BYTES = ElementType("uint8", 1, 0)


def stored_state(
    reader: Reader, options: Options, advice: str = "", done: Callable[[int], None] = lambda n_bytes: None
) -> SealedState:
    """The state of one rank, of a vote that was opened and whose transforms can all be read. Close its source at last.

    Takes an eighth of `options.host_budget_bytes`, at least 32 MiB, and up to `options.connections` threads. advice: for the error of a
    damaged chunk. done: called on any thread with the bytes of each chunk that is not needed any more.
    """
    numbers = used_rows(reader)
    place = {row: number for number, row in enumerate(numbers)}
    storages = tuple(
        storage if storage.extents is None else storage._replace(extents=_moved(storage.extents, place))
        for storage in reader.directory.storages
    )
    elements = _elements(reader)
    raw_bytes = reader.records["raw_bytes"][numbers].tolist()
    chunks = tuple(
        SealedChunk(n_bytes, elements[row] if n_bytes % elements[row].n_bytes == 0 else _OF_BYTES)
        for row, n_bytes in zip(numbers, raw_bytes, strict=True)
    )
    return SealedState(
        reader.skeleton,
        storages,
        reader.directory.tensors,
        chunks,
        StoredChunks(reader, numbers, options, advice, done),
        reader.directory.writer.get("torch", ""),
    )


def used_rows(reader: Reader) -> list[int]:
    """The numbers of the rows that storages use, in order. All others are only bases."""
    used: set[int] = set()
    for number in range(len(reader.directory.storages)):
        used.update(piece.chunk for piece in reader.pieces(number))
    return sorted(used)


def _moved(extents: Sequence[Extent], place: dict[int, int]) -> tuple[Extent, ...]:
    """What runs on through next rows still does: all of these are used."""
    return tuple(extent._replace(record=place[extent.record]) for extent in extents if extent.n_bytes)


def _elements(reader: Reader) -> dict[int, ElementType]:
    """The element type of each row that is used."""
    found: dict[int, ElementType] = {}
    known: dict[str, ElementType] = {}
    for number, storage in enumerate(reader.directory.storages):
        if storage.dtype not in known:
            known[storage.dtype] = _element_of(storage)
        for piece in reader.pieces(number):
            found.setdefault(piece.chunk, known[storage.dtype])
    return found


def _element_of(storage: StorageEntry) -> ElementType:
    element = element_type(storage.dtype) or _OF_BYTES
    # Strings of NumPy have any length: bytes are as good a unit as any other.
    return element if element.n_bytes in (1, 2, 4, 8, 16) else element._replace(n_bytes=1, float_lane_bytes=0)


class StoredChunks:
    """A `ChunkSource` of a stored index. Any thread; a chunk may be asked for again."""

    any_order = True

    def __init__(
        self, reader: Reader, numbers: Sequence[int], options: Options, advice: str, done: Callable[[int], None]
    ) -> None:
        """numbers: the rows, in the order of the chunks."""
        self._reader, self._numbers, self._advice, self._done = reader, numbers, advice, done
        ahead = max(2, options.host_budget_bytes // 8 // _BYTES_OF_ONE)
        threads = min(ahead, max(options.connections, options.threads), len(numbers))
        self._ahead = min(ahead, 2 * threads)
        self._pool = WorkerPool(threads, "fastckpt-compact")
        self._lock = threading.Lock()
        self._begun: dict[int, Future[U8]] = {}
        """Read ahead, or being read: never more than `_ahead`, in whatever order chunks are asked for."""
        self._asked: set[int] = set()

    def raw(self, number: int, scratch: U8) -> U8:
        """A chunk's bytes. CorruptCheckpointError names what is damaged; StoreError."""
        with self._lock:
            for later in range(number, min(number + self._ahead, len(self._numbers))):
                if len(self._begun) < self._ahead and later not in self._asked:
                    self._asked.add(later)
                    self._begun[later] = self._pool.submit(functools.partial(self._read, later))
            self._asked.add(number)
            found = self._begun.get(number)
        return self._read(number) if found is None else found.result()

    def peek(self, number: int, scratch: U8) -> AbstractContextManager[U8 | None]:
        """Context with a chunk's bytes, whether or not its `raw` has been asked for. Errors as those of `raw`."""
        with self._lock:
            found = self._begun.get(number)
        return nullcontext(self._read(number) if found is None else found.result())

    def _read(self, number: int) -> U8:
        row = self._numbers[number]
        out = np.empty(int(self._reader.records["raw_bytes"][row]), np.uint8)
        damage = self._reader.read_chunk(row, out)
        if damage is not None:
            raise CorruptCheckpointError(self._reader.source.name, [damage], self._advice)
        return out

    def known(self, number: int) -> bytes | None:
        """Nothing is known without its bytes."""
        return None

    def release(self, number: int) -> None:
        """Free the chunk's memory."""
        with self._lock:
            self._begun.pop(number, None)
        self._done(int(self._reader.records["raw_bytes"][self._numbers[number]]))

    def confirm(self) -> None:
        """Does nothing: every chunk was verified when it was read."""

    def close(self) -> None:
        """End the threads. May be called twice."""
        self._pool.close()


__all__ = ["StoredChunks", "stored_state", "used_rows"]
