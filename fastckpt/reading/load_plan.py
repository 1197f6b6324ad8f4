"""Lists the pieces of the storages that are to be loaded: which bytes of which chunk are which bytes of which storage. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

from fastckpt.reading.chunk_reader import Reader

Piece: TypeAlias = tuple[int, int, int, int]
"""A stretch of one storage in one chunk: (storage, offset in the chunk, offset in the storage, bytes).

A bare tuple: Python's collector does not walk those that hold only numbers, and a state may have 100,000.
"""


class LoadPlan:
    """See the module."""

    def __init__(self, reader: Reader, wanted: Sequence[int] | None = None) -> None:
        """wanted: the only storages that will be loaded, in this order; None: any, in the order of the directory."""
        storages = reader.directory.storages
        self.order: Sequence[int] = range(len(storages)) if wanted is None else wanted
        self.n_bytes = sum(storages[number].n_bytes for number in self.order if storages[number].extents is not None)
        """Of all storages that have data."""
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        """What each chunk is needed for, by its record."""
        self.records: dict[int, list[int]] = {}
        """The records of the chunks that each storage needs, in the order of its bytes."""
        for number in self.order:
            if storages[number].shares:  # what it lacks would be whatever lay in fresh memory
                raise ValueError(
                    f"{reader.source.name} has shares of storages only: merge it with the votes of their owners"
                )
            records = self.records[number] = []
            for record, offset, position, n_bytes in reader.pieces(number):
                self.pieces[record].append((number, offset, position, n_bytes))
                records.append(record)
