"""A base whose bytes are not in memory: they are read from a state, or from a stored checkpoint, when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fastckpt._types import U8
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.format.sealed_state import ChunkSource
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.upkeep.compact.stored_state import stored_state, used_rows
from fastckpt.writing.bases import Base, Place


class KnownBytes:
    """`writing.bases.BaseBytes` of a source whose chunks may be asked for in any order, any number of times."""

    def __init__(self, source: ChunkSource, n_bytes: Sequence[int]) -> None:
        """n_bytes: of each chunk."""
        self._source, self._n_bytes = source, n_bytes

    @contextmanager
    def lend(self, chunk: int) -> Iterator[U8 | None]:
        """A chunk's bytes. Raises what the source does."""
        yield self._source.raw(chunk, np.empty(self._n_bytes[chunk], np.uint8))
        self._source.release(chunk)


@contextmanager
def stored_base(reader: Reader, commit: Commit, options: Options) -> Iterator[Base]:
    """Context with one rank of a checkpoint as a base. Memory as for `stored_state`; chunks are verified when they are read."""
    state = stored_state(reader, options)
    try:
        memory = KnownBytes(state.source, [chunk.n_bytes for chunk in state.chunks])
        places = [Place(row) for row in used_rows(reader)]
        parent = Parent(commit.checkpoint, commit.digest)
        yield Base(
            parent, state.storages, state.tensors, state.chunks, places, reader.records, tuple(reader.files), memory
        )
    finally:
        state.source.close()


__all__ = ["KnownBytes", "stored_base"]
