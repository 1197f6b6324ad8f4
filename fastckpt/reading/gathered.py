"""Records of several votes side by side, as if they were those of one: a restore takes bytes that many ranks have written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastckpt.format import records
from fastckpt.format.directory import Extent, FileEntry
from fastckpt.format.records import Records
from fastckpt.kernels.transform import HAS_BASE
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.sources import Source


class Gathered:
    """Of each vote only the records that are needed are kept, so many may be added one after another. Used by one thread."""

    def __init__(self, own: Reader, *, whole: bool) -> None:
        """own: the vote whose records come first, if `whole` all of them; what lies in the index itself is read from its source."""
        self._chunks: list[Records] = [own.records if whole else own.records[:0]]
        self.files: list[FileEntry] = [*own.files] if whole else []
        self.sources: list[Source] = [*own.sources] if whole else [own.source]
        """Of the own index itself, then of each file."""
        self._numbers = {file: number for number, file in enumerate(self.files, 1)}
        """Ranks may name the same packs of an earlier save: what lies side by side there is read together."""
        self.origins: list[tuple[int, int]] = []
        """Rank and number of each record that was taken."""

    @property
    def chunks(self) -> Records:
        """All records."""
        return np.concatenate(self._chunks)

    def take(self, rank: int, other: Reader, extents: Sequence[Extent]) -> list[Extent]:
        """Take the records that some extents of a vote need. Returns the extents as they are among all records."""
        numbers = _needed_records(other.records, extents)
        first = sum(map(len, self._chunks))
        chunks = other.records[numbers].copy()
        in_pack = chunks["file"] > 0
        used, places = np.unique(chunks["file"][in_pack], return_inverse=True)
        files = np.array([self._number(other, file) for file in used.tolist()], np.uint32)
        chunks["file"][in_pack] = files[places]
        _move_bases(chunks, numbers, first)
        self._chunks.append(chunks)
        self.origins += [(rank, number) for number in numbers.tolist()]
        found = np.searchsorted(numbers, np.array([extent.record for extent in extents], np.int64))
        return [extent._replace(record=first + int(at)) for extent, at in zip(extents, found.tolist(), strict=True)]

    def _number(self, other: Reader, file: int) -> int:
        """The number that a file of another vote has among all files."""
        entry = other.files[file - 1]
        if entry not in self._numbers:
            self.files.append(entry)
            self.sources.append(other.sources[file])
            self._numbers[entry] = len(self.files)
        return self._numbers[entry]


def _needed_records(chunks: Records, extents: Sequence[Extent]) -> npt.NDArray[np.int64]:
    """The records that some extents need, and the bases of these, in order. What one extent runs through stays side by side."""
    needed: set[int] = set()
    ends = np.cumsum(chunks["raw_bytes"], dtype=np.int64)
    for record, offset, n_bytes in extents:
        start = int(ends[record]) - int(chunks["raw_bytes"][record]) + offset
        last = int(np.searchsorted(ends, start + n_bytes, "left"))
        needed.update(range(record, last + 1))
    based = np.isin(chunks["transform"], sorted(HAS_BASE))
    if based.any():
        waiting = [number for number in needed if based[number]]
        while waiting:
            first, start, n_bytes = records.base_of(chunks[waiting.pop()])
            spans = start + n_bytes > int(chunks["raw_bytes"][first])
            for number in (first, first + 1) if spans else (first,):
                if number not in needed:
                    needed.add(number)
                    waiting += [number] if based[number] else []
    return np.array(sorted(needed), np.int64)


def _move_bases(chunks: Records, numbers: npt.NDArray[np.int64], first: int) -> None:
    """Let bases name the records that they have become. numbers: what they were. first: of the first one, what it is now."""
    rows = np.flatnonzero(np.isin(chunks["transform"], sorted(HAS_BASE)))
    for row in rows.tolist():
        base, rest = chunks["parameter"][row].tobytes()[:4], chunks["parameter"][row].tobytes()[4:]
        moved = first + int(np.searchsorted(numbers, int.from_bytes(base, "little")))
        chunks["parameter"][row] = np.void(moved.to_bytes(4, "little") + rest)
