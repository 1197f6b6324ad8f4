"""The chunks that hold what a rank needs of a checkpoint, found by other code than that which plans a restore, which is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastckpt.format.directory import StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.repository_records import Commit
from fastckpt.format.tensor_names import Name
from fastckpt.format.wholes import Box
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.saved_ranks import SavedRanks


class Chunk(NamedTuple):
    """Where a chunk lies."""

    key: str
    offset: int
    n_bytes: int


def needed(store: Any, commit: Commit, boxes: Mapping[Name, Sequence[Box]]) -> list[Chunk]:
    """The chunks of all votes that hold elements of these blocks, each once, in the order of the packs.

    Args:
        boxes: for each name of a tensor, the blocks of the whole that are needed. What was no DTensor is taken from rank 0.
    """
    ranks, found = SavedRanks(store, commit), set()
    for rank in range(commit.world):
        reader = ranks.vote(rank)
        ends = np.cumsum(reader.records["raw_bytes"], dtype=np.int64)
        for entry in reader.directory.tensors:
            if entry.place is None and rank:
                continue
            for box in boxes.get(entry.name, ()):
                span = _span(entry, box)
                if span is not None:
                    found |= set(_chunks(reader, ends, reader.directory.storages[entry.storage], *span))
    return sorted(found)


def _span(entry: TensorEntry, box: Box) -> tuple[int, int] | None:
    """First and last byte in its storage of what a block of the whole and a rank's part have in common; None: nothing."""
    at = entry.place.offset if entry.place is not None else (0,) * len(entry.shape)
    first = last = entry.offset
    for own, size, stride, start, length in zip(at, entry.shape, entry.stride, *box, strict=True):
        low, high = max(own, start), min(own + size, start + length)
        if low >= high:
            return None
        first += (low - own) * stride
        last += (high - 1 - own) * stride
    element = element_type(entry.dtype)
    assert element is not None, entry.dtype
    return first * element.n_bytes, (last + 1) * element.n_bytes - 1


def _chunks(reader: Reader, ends: Any, storage: StorageEntry, first: int, last: int) -> Iterator[Chunk]:
    at = 0
    for record, offset, n_bytes in storage.extents or ():
        low, high = max(first, at), min(last, at + n_bytes - 1)
        if low <= high:
            begin = int(ends[record]) - int(reader.records["raw_bytes"][record]) + offset - at
            numbers = np.searchsorted(ends, [begin + low, begin + high], "right").tolist()
            for row in reader.records[numbers[0] : numbers[1] + 1]:
                if row["file"]:
                    key = reader.files[int(row["file"]) - 1].key
                    yield Chunk(key, int(row["offset"]), int(row["stored_bytes"]))
        at += n_bytes
