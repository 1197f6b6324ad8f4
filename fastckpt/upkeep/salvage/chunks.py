"""Chunks of a stored index: finds the damaged ones, and supplies the bytes of the others for a new container."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt

from fastckpt._types import U8, Progress
from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format import records
from fastckpt.host.threads import WorkerPool
from fastckpt.kernels.transform import MAX_RAW_BYTES, transform_name
from fastckpt.reading.chunk_reader import Reader, StoredPiece
from fastckpt.state.chunking import Cuts

_CACHED_CHUNKS = 16  # of at most 4 MiB: new bundles of small tensors take their pieces from several old ones in turn


def bad_chunks(
    reader: Reader,
    numbers: Sequence[int],
    threads: int,
    progress: Progress = lambda done, total: None,
) -> dict[int, Damage]:
    """Read and decode chunks on several threads. Returns the damage of each chunk that is damaged, missing or unsupported.

    progress: called on any of the threads, but only on one at a time, with chunks done and chunks in all.
    """
    unread = records.unreadable(reader.records)
    bad: dict[int, Damage] = {}
    lock, stop, done = threading.Lock(), threading.Event(), 0

    def work(some: npt.NDArray[np.int64]) -> None:
        nonlocal done
        out = np.empty(MAX_RAW_BYTES, np.uint8)
        for number in some.tolist():
            if stop.is_set():
                return
            if number in unread:
                name = transform_name(int(reader.records["transform"][number]))
                found: Damage | None = Damage("payload", f"chunk {number}", "a transform known here", name)
            else:
                found = reader.read_chunk(number, out[: int(reader.records["raw_bytes"][number])])
            with lock:
                if found is not None:
                    bad[number] = found
                done += 1
                progress(done, len(numbers))

    slices = np.array_split(np.array(numbers, np.int64), max(1, min(threads, len(numbers))))
    pool = WorkerPool(len(slices), "fastckpt-salvage")
    try:
        for future in [pool.submit(lambda some=some: work(some)) for some in slices]:  # type: ignore[misc]
            future.result()
    finally:
        stop.set()
        pool.close()
    return bad


class StoredBytes:
    """The bytes of storages, by number, from the chunks that hold them. Keeps the last few chunks. Any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._chunks: OrderedDict[int, U8] = OrderedDict()
        self._pieces: dict[int, tuple[list[int], list[StoredPiece]]] = {}
        self._lock = threading.Lock()

    def read_into(self, storage: int, offset: int, out: U8) -> None:
        """Fill `out` with the bytes of a storage from `offset` on. CorruptCheckpointError, StoreError."""
        starts, pieces = self._pieces_of(storage)
        done = 0
        while done < out.size:
            chunk, first, position, n_bytes = pieces[bisect_right(starts, offset + done) - 1]
            skip = offset + done - position
            n = min(n_bytes - skip, out.size - done)
            out[done : done + n] = self._chunk(chunk)[first + skip : first + skip + n]
            done += n

    def _pieces_of(self, storage: int) -> tuple[list[int], list[StoredPiece]]:
        """The start of each piece of a storage, and the pieces (`Reader.pieces`)."""
        with self._lock:
            found = self._pieces.get(storage)
            if found is None:
                pieces = list(self._reader.pieces(storage))
                found = self._pieces[storage] = [piece.position for piece in pieces], pieces
            return found

    def _chunk(self, number: int) -> U8:
        with self._lock:
            if number in self._chunks:
                self._chunks.move_to_end(number)
                return self._chunks[number]
        out = np.empty(int(self._reader.records["raw_bytes"][number]), np.uint8)
        damage = self._reader.read_chunk(number, out)
        if damage is not None:  # the chunk was right a moment ago
            raise CorruptCheckpointError(self._reader.source.name, [damage], "Run `fastckpt salvage` once more")
        with self._lock:
            self._chunks[number] = out
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        return out


class SalvagedChunks:
    """A `CutSource`: the chunks of a new container, whose bytes are read from stored ones when they are encoded.

    cuts: where the new container's storages are cut. stored_as: number of a new storage → its number in the old index.
    """

    any_order = True

    def __init__(self, cuts: Cuts, stored: StoredBytes, stored_as: Mapping[int, int]) -> None:
        self.cuts = cuts
        self._stored = stored
        self._stored_as = stored_as

    def known(self, number: int) -> bytes | None:
        """None: every chunk is read."""

    def raw(self, number: int, scratch: U8) -> U8:
        """A chunk's bytes, in `scratch`. CorruptCheckpointError if they have become damaged."""
        chunk = self.cuts.chunks[number]
        raw, position = scratch[: chunk.n_bytes], 0
        for piece in chunk.pieces:
            part = raw[position : position + piece.n_bytes]
            self._stored.read_into(self._stored_as[piece.storage], piece.offset, part)
            position += piece.n_bytes
        return raw

    def peek(self, number: int, scratch: U8) -> AbstractContextManager[U8 | None]:
        """As `raw`."""
        return nullcontext(self.raw(number, scratch))

    def release(self, number: int) -> None:
        """Does nothing: the scratch buffer is the caller's."""

    def confirm(self) -> None:
        """Does nothing: every chunk was verified when it was read."""

    def close(self) -> None:
        """Does nothing: the reader belongs to the caller."""
