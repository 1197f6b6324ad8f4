"""Lists the pieces of the storages to load: for each piece its bytes in a chunk and its bytes in a storage. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

from fastckpt.reading.chunk_reader import Reader

Piece: TypeAlias = tuple[int, int, int, int]
"""A stretch of one storage in one chunk: (storage, offset in the chunk, offset in the storage, bytes).

A plain tuple: Python's cycle collector does not walk tuples of numbers, and a state may have 100,000 pieces.
"""


class LoadPlan:
    """See the module."""

    def __init__(self, reader: Reader, wanted: Sequence[int] | None = None) -> None:
        """wanted: the only storages to load, in this order; None: all, in the order of the directory."""
        storages = reader.directory.storages
        self.order: Sequence[int] = range(len(storages)) if wanted is None else wanted
        self.n_bytes = sum(storages[number].n_bytes for number in self.order if storages[number].extents is not None)
        """Bytes of all these storages that have data."""
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        """Number of a chunk → the pieces that need it."""
        self.chunks: dict[int, list[int]] = {}
        """Number of a storage → numbers of the chunks that it needs, in the order of its bytes."""
        for number in self.order:
            if storages[number].shares:  # what it lacks would be whatever lay in fresh memory
                raise ValueError(
                    f"{reader.source.name} has shares of storages only: merge it with the votes of their owners"
                )
            chunks = self.chunks[number] = []
            for chunk, offset, position, n_bytes in reader.pieces(number):
                self.pieces[chunk].append((number, offset, position, n_bytes))
                chunks.append(chunk)
