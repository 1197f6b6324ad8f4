"""Where the chunks of the restored objects are stored already: in rows of the checkpoint's votes. Pure: from what votes list to places.

names, shapes ─→ Stretch: bytes of a live storage that are bytes of a saved one
extents ───────→ pieces of rows, joined where they follow each other
rows ──────────→ one table of all ranks' rows that are needed, with one file table
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastckpt.format.directory import Directory, Extent, FileEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.records import Records
from fastckpt.format.tensor_names import Name
from fastckpt.format.wholes import Block, Whole
from fastckpt.reading.chunk_reader import Reader, StoredPiece
from fastckpt.reading.gathered import Gathered
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk, Cuts
from fastckpt.state.shards import is_box
from fastckpt.writing.bases import Place


class Stretch(NamedTuple):
    """Bytes of a live storage, from `at` on, that are those of a saved storage, from `start` on."""

    at: int
    n_bytes: int
    rank: int
    storage: int
    start: int


Stretches = Mapping[int, Sequence[Stretch]]
"""By the number of a live storage, in order; where nothing stands, nothing is known."""


class Placed(NamedTuple):
    """Where chunks are stored, as a `writing.bases.Base` has it."""

    places: Sequence[Place | None]
    records: Records
    files: tuple[FileEntry, ...]

    def digests(self, cuts: Cuts) -> dict[int, bytes]:
        """Of each chunk that has a row of its own, by its number."""
        found = {}
        for number, place in enumerate(self.places):
            if place is not None and not place.start:
                row = self.records[place.row]
                if int(row["raw_bytes"]) == cuts.chunks[number].n_bytes:
                    found[number] = row["digest"].tobytes()
        return found


def stretches_of_one(captured: Captured, saved: Directory, rank: int) -> Stretches:
    """What lies where one rank's index has it: storages with a tensor of the same name, form and place in it."""
    known = {entry.name: entry for entry in saved.tensors}
    found: dict[int, Sequence[Stretch]] = {}
    for entry in captured.tensors:
        there = known.get(entry.name)
        if (
            there is None
            or entry.storage in found
            or there._replace(storage=entry.storage, requires_grad=entry.requires_grad) != entry
        ):
            continue
        n_bytes = captured.storages[entry.storage].n_bytes
        if saved.storages[there.storage].n_bytes == n_bytes:
            found[entry.storage] = [Stretch(0, n_bytes, rank, there.storage, 0)]
    return found


def stretches_of_many(captured: Captured, wholes: Mapping[Name, Whole], first: Stretches) -> Stretches:
    """What lies in blocks of several ranks, and else as in `first`. Only of parts along the first dimension: others do not lie in one
    stretch.
    """
    found: dict[int, Sequence[Stretch]] = {}
    spread: set[int] = set()
    for entry in captured.tensors:
        name = entry.name[:-2] if is_box(entry) else entry.name
        whole = wholes.get(name)
        if whole is None or not whole.was_spread:
            continue
        spread.add(entry.storage)
        if entry.storage in found or entry.dtype != whole.dtype:
            continue
        if whole.doubtful or whole.is_contradicted:  # which of them was taken is not known here
            continue
        stretches = _of_blocks(entry, whole)
        if stretches:
            found[entry.storage] = stretches
    return {**{number: one for number, one in first.items() if number not in spread}, **found}


def _of_blocks(entry: TensorEntry, whole: Whole) -> list[Stretch]:
    at = (0,) * len(entry.shape) if entry.place is None else entry.place.offset
    element = element_type(entry.dtype)
    if element is None or entry.offset or not _is_flat(entry.shape, entry.stride, whole.shape, at):
        return []
    width = element.n_bytes  # what lies behind the tensor, such as the padding of FSDP's last rank, is in no stretch
    row = width * math.prod(entry.shape[1:])
    found: list[Stretch] = []
    for block in sorted(whole.blocks):
        if not _is_flat(block.shape, block.stride, whole.shape, block.at):
            return []
        start = max(at[0], block.at[0]) if at else 0
        end = min(at[0] + entry.shape[0], block.at[0] + block.shape[0]) if at else 1
        if start < end:
            if found and start * row < found[-1].at + found[-1].n_bytes + at[0] * row:
                return []  # blocks that overlap: which of them was taken is not known here
            here, there = (start - at[0], start - block.at[0]) if at else (0, 0)
            found.append(
                Stretch(here * row, (end - start) * row, block.rank, block.storage, block.offset * width + there * row)
            )
    return found


def _is_flat(shape: Sequence[int], stride: Sequence[int], whole: Sequence[int], at: Sequence[int]) -> bool:
    """Whether a block lies in memory as in the whole: contiguous, and cut along the first dimension alone."""
    if len(shape) != len(whole) or tuple(shape[1:]) != tuple(whole[1:]) or any(at[1:]):
        return False
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def place_chunks(cuts: Cuts, stretches: Stretches, readers: Mapping[int, Reader]) -> Placed:
    """Find the rows of each chunk. readers: of each rank that a stretch names, its index with what owners have written for it."""
    pieces = _Pieces(readers)
    runs = [_joined(pieces, chunk, stretches) for chunk in cuts.chunks]
    needed: dict[int, set[int]] = defaultdict(set)
    for run in runs:
        for one in run:
            needed[one.rank].add(one.row)
    if not needed:
        return Placed([None] * len(runs), np.zeros(0, next(iter(readers.values())).records.dtype), ())
    gathered = Gathered(readers[min(needed)], whole=False)
    moved: dict[tuple[int, int], int] = {}
    for rank, rows in sorted(needed.items()):
        reader, ordered = readers[rank], sorted(rows)
        extents = [Extent(row, 0, int(reader.records["raw_bytes"][row])) for row in ordered]
        for row, extent in zip(ordered, gathered.take(rank, reader, extents), strict=True):
            moved[rank, row] = extent.record
    records = gathered.chunks
    again: list[int] = []
    """Rows that stand in the table once more, because two of them have to follow each other."""
    places: list[Place | None] = []
    for run in runs:
        rows_of_run = [moved[one.rank, one.row] for one in run]
        if not run:
            places.append(None)
        elif len(run) == 1 or rows_of_run[1] == rows_of_run[0] + 1:
            places.append(Place(rows_of_run[0], run[0].start))
        else:
            places.append(Place(len(records) + len(again), run[0].start))
            again += rows_of_run
    return Placed(places, *_with_one_name_each(np.concatenate([records, records[again]]), gathered.files))


class _Run(NamedTuple):
    """Bytes of one row."""

    rank: int
    row: int
    start: int
    n_bytes: int


class _Pieces:
    """The pieces of rows that saved storages are made of, found once for each of them."""

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        self._readers = readers
        self._known: dict[tuple[int, int], list[StoredPiece]] = {}

    def row_bytes(self, rank: int, row: int) -> int:
        return int(self._readers[rank].records["raw_bytes"][row])

    def of(self, stretch: Stretch, start: int, end: int) -> Iterator[_Run]:
        """What bytes `start` to `end` of a live storage, which lie in the stretch, are made of."""
        key = stretch.rank, stretch.storage
        if key not in self._known:
            self._known[key] = list(self._readers[stretch.rank].pieces(stretch.storage))
        begin, stop = start - stretch.at + stretch.start, end - stretch.at + stretch.start
        for piece in self._known[key]:
            first, last = max(begin, piece.position), min(stop, piece.position + piece.n_bytes)
            if first < last:
                yield _Run(stretch.rank, piece.chunk, piece.offset + first - piece.position, last - first)


def _joined(pieces: _Pieces, chunk: Chunk, stretches: Stretches) -> list[_Run]:
    """The rows that a chunk is made of, one or two; [] if they are more, or do not hold all of it one after the other."""
    found: list[_Run] = []
    for piece in chunk.pieces:
        at, end = piece.offset, piece.offset + piece.n_bytes
        for stretch in stretches.get(piece.storage, ()):
            if stretch.at <= at < min(end, stretch.at + stretch.n_bytes):
                stop = min(end, stretch.at + stretch.n_bytes)
                for run in pieces.of(stretch, at, stop):
                    _join(found, run)
                    at += run.n_bytes
        if at != end or len(found) > 2:
            return []
    if len(found) == 2:
        first, second = found
        if second.start or first.start + first.n_bytes != pieces.row_bytes(first.rank, first.row):
            return []
    return found


def _join(found: list[_Run], run: _Run) -> None:
    if found and found[-1][:2] == run[:2] and found[-1].start + found[-1].n_bytes == run.start:
        found[-1] = found[-1]._replace(n_bytes=found[-1].n_bytes + run.n_bytes)
    else:
        found.append(run)


def _with_one_name_each(records: Records, files: Sequence[FileEntry]) -> tuple[Records, tuple[FileEntry, ...]]:
    """The records with a file table that names each pack once: several votes may name the same one."""
    kept = {file.key: file for file in files}
    numbers = {key: number + 1 for number, key in enumerate(kept)}
    renamed = np.array([0, *(numbers[file.key] for file in files)], np.uint32)
    records["file"] = renamed[records["file"]]
    return records, tuple(kept.values())


__all__ = ["Block", "Placed", "Stretch", "Stretches", "place_chunks", "stretches_of_many", "stretches_of_one"]
