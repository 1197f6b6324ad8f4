"""The rows of an index whose chunks refer to others: to rows of a base, or, bfloat16 copies, to their float32 masters. Pure.

    carried rows of the base ─┐   what others need, in the base's order: bases come before what needs them
    rows of chunks ───────────┼─→ records, and the extents that follow from them
    rows of cast copies ──────┘   after their masters

While a save goes on, rows name the base's rows and files by the numbers of the base. Here they get those of the new index.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastckpt.format.directory import Extent, FileEntry, StorageEntry
from fastckpt.format.records import LAYOUT, Records
from fastckpt.host import cycle_collector
from fastckpt.kernels.transform import Transform
from fastckpt.writing.bases import Base, Place
from fastckpt.writing.chains import Numbers, bases_of, needed_by


class Kind(enum.IntEnum):
    """How the row of a chunk came about."""

    OWN = 0
    """It refers to nothing."""
    COPIED = 1
    """It is a row of the base again, under its number in the base."""
    BASED = 2
    """Its base is in the base: from a byte of one of its rows on."""
    CAST = 3
    """It is a row for each piece, whose bases are other chunks of the same state."""


class CastRow(NamedTuple):
    """A piece of a chunk of bfloat16 numbers that are those of a float32 master."""

    n_bytes: int
    digest: bytes
    chunk: int
    """That has the master's numbers …"""
    start: int
    """… from this byte on."""


class Links:
    """What the rows of chunks refer to. Each chunk is entered by one thread."""

    def __init__(self, n_chunks: int) -> None:
        self.kind = np.zeros(n_chunks, np.uint8)
        self.row = np.zeros(n_chunks, np.int64)
        self.start = np.zeros(n_chunks, np.int64)
        self.casts: dict[int, tuple[CastRow, ...]] = {}

    def set(self, number: int, kind: Kind, place: Place) -> None:
        """The chunk's row is the base's `place`, or is based on it."""
        self.kind[number], self.row[number], self.start[number] = kind, *place

    def set_cast(self, number: int, rows: tuple[CastRow, ...]) -> None:
        """The chunk's numbers are those of masters."""
        self.kind[number], self.casts[number] = Kind.CAST, rows

    def repeat(self, number: int, earlier: int) -> None:
        """The chunk's row is that of an earlier chunk."""
        self.set(number, Kind(int(self.kind[earlier])), Place(int(self.row[earlier]), int(self.start[earlier])))


class Built(NamedTuple):
    """See `build`."""

    records: Records
    storages: tuple[StorageEntry, ...]
    files: tuple[FileEntry, ...]
    """Packs of earlier saves that the records name, after the own ones."""
    places: list[Place | None]
    """Of each chunk."""


def build(
    rows: Records, links: Links, base: Base | None, n_own_files: int, storages: tuple[StorageEntry, ...]
) -> Built:
    """The rows and extents of an index.

    Args:
        rows: of each chunk; what those of kind CAST hold does not matter.
        links: what they refer to.
        base: whose rows and files they name. None: none of them does.
        n_own_files: how many packs the save has put.
        storages: whose extents count chunks.
    """
    if not links.kind.any():
        return Built(rows, storages, (), [Place(number) for number in range(len(rows))])
    if base is not None:
        _cast_from_own(links, base)
    counts = np.ones(len(rows), np.int64)
    for number, casts in links.casts.items():
        counts[number] = len(casts)
    carried, needed = _carried(rows, links, base)
    first = _order(storages, rows["raw_bytes"].astype(np.int64), links, counts) + carried.size
    out = np.zeros(carried.size + int(counts.sum()), LAYOUT)
    plain = np.flatnonzero(links.kind != Kind.CAST)
    out[first[plain]] = rows[plain]
    files: tuple[FileEntry, ...] = ()
    if base is not None:
        copied, based = (np.flatnonzero(links.kind == kind) for kind in (Kind.COPIED, Kind.BASED))
        out[: carried.size] = base.records[carried]
        out[first[copied]] = base.records[links.row[copied]]
        from_base = np.concatenate([np.arange(carried.size), first[copied]])
        _renumber_bases(out, from_base, needed)
        elements = links.start[based] // out["lane_bytes"][first[based]]
        _set_parameters(out, first[based], needed[links.row[based]], elements)
        files = _renumber_files(out, from_base, base.files, n_own_files)
    _fill_casts(out, links.casts, first)
    places = [Place(at) if n <= 2 else None for at, n in zip(first.tolist(), counts.tolist(), strict=True)]
    with cycle_collector.held_off():
        return Built(out, _moved(storages, links.casts, first), files, places)


def _cast_from_own(links: Links, base: Base) -> None:
    """Copies and masters that are both the base's again: the copy's row names the master's here, so that nothing is carried for it."""
    copied = np.flatnonzero(links.kind == Kind.COPIED)
    casts = copied[base.records["transform"][links.row[copied]] == Transform.CAST]
    if not casts.size:
        return
    bases = bases_of(base.records)
    owner = dict(zip(links.row[copied].tolist(), copied.tolist(), strict=True))
    for number in casts.tolist():
        row = int(links.row[number])
        first, second = int(bases.first[row]), int(bases.second[row])
        master = owner.get(first)
        if master is None or (second != first and owner.get(second) != master + 1):
            continue
        record = base.records[row]
        links.set_cast(
            number,
            (CastRow(int(record["raw_bytes"]), record["digest"].tobytes(), master, int(bases.start[row])),),
        )


def _carried(rows: Records, links: Links, base: Base | None) -> tuple[Numbers, Numbers]:
    """The rows of the base that others need, and for each row of the base its new number."""
    if base is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    bases = bases_of(base.records)
    copied, based = (np.flatnonzero(links.kind == kind) for kind in (Kind.COPIED, Kind.BASED))
    direct = links.row[based]
    spans = links.start[based] + rows["raw_bytes"][based].astype(np.int64) > base.records["raw_bytes"][direct]
    direct = np.concatenate([direct, direct[spans] + 1])
    needed = needed_by(bases, np.concatenate([links.row[copied], direct]))
    needed[direct] = True
    return np.flatnonzero(needed), np.cumsum(needed) - 1


def _order(storages: Sequence[StorageEntry], raw_bytes: Numbers, links: Links, counts: Numbers) -> Numbers:
    """The number of each chunk's first row among those of all chunks: cast copies last, but together what one storage runs through."""
    n = raw_bytes.size
    order = np.arange(n)
    if links.casts:
        ends = np.cumsum(raw_bytes)
        starts = ends - raw_bytes
        joined = np.zeros(n, bool)  # with the chunk before it
        for storage in storages:
            for chunk, offset, n_bytes in storage.extents or ():
                last = int(np.searchsorted(ends, starts[chunk] + offset + n_bytes))
                joined[chunk + 1 : last + 1] = True
        group = np.cumsum(~joined) - 1
        late = np.bincount(group, links.kind == Kind.CAST) > 0
        order = np.argsort(late[group], kind="stable")
    first = np.zeros(n, np.int64)
    first[order] = np.cumsum(counts[order]) - counts[order]
    return first


def _set_parameters(out: Records, at: Numbers, base: Numbers, element: Numbers) -> None:
    parameters = np.stack([base, element], axis=1).astype("<u4")
    out["parameter"][at] = parameters.view("V8").reshape(-1)


def _renumber_bases(out: Records, at: Numbers, new: Numbers) -> None:
    """Rows that were copied from the base name their own bases by new numbers."""
    at = at[np.isin(out["transform"][at], (Transform.SUB, Transform.SUBPACK, Transform.CAST, Transform.REF))]
    parameters = np.ascontiguousarray(out["parameter"][at]).view(("<u4", 2)).astype(np.int64).reshape(-1, 2)
    _set_parameters(out, at, new[parameters[:, 0]], parameters[:, 1])


def _renumber_files(out: Records, at: Numbers, files: Sequence[FileEntry], n_own_files: int) -> tuple[FileEntry, ...]:
    at = at[out["file"][at] > 0]
    used, number = np.unique(out["file"][at], return_inverse=True)
    out["file"][at] = n_own_files + 1 + number
    return tuple(files[file - 1] for file in used.tolist())


def _fill_casts(out: Records, casts: Mapping[int, Sequence[CastRow]], first: Numbers) -> None:
    for number, pieces in casts.items():
        at = int(first[number]) + np.arange(len(pieces))
        out["transform"][at], out["lane_bytes"][at] = Transform.CAST, 2
        out["raw_bytes"][at] = [piece.n_bytes for piece in pieces]
        out["digest"][at] = np.frombuffer(b"".join(piece.digest for piece in pieces), "V16")
        masters = np.array([(first[piece.chunk], piece.start // 4) for piece in pieces], np.int64)
        _set_parameters(out, at, masters[:, 0], masters[:, 1])


def _moved(
    storages: tuple[StorageEntry, ...], casts: Mapping[int, Sequence[CastRow]], first: Numbers
) -> tuple[StorageEntry, ...]:
    """The storages with extents that count rows."""
    if not casts and (not first.size or int(first[0]) == 0):
        return storages
    new = first.tolist()
    ends = {number: np.cumsum([piece.n_bytes for piece in pieces]).tolist() for number, pieces in casts.items()}

    def moved(extent: Extent) -> Extent:
        chunk, offset, n_bytes = extent
        if not offset or chunk not in ends:
            return Extent(new[chunk], offset, n_bytes)
        at = int(np.searchsorted(ends[chunk], offset, "right"))
        return Extent(new[chunk] + at, offset - (ends[chunk][at - 1] if at else 0), n_bytes)

    return tuple(
        storage._replace(extents=tuple(map(moved, storage.extents))) if storage.extents else storage
        for storage in storages
    )
