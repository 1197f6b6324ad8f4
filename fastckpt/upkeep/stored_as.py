"""How a rank's bytes are stored: by which transforms, in packs of which saves, and what a restore reads for it. Pure, from its index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, parse_pack
from fastckpt.format.records import Records, transform_of
from fastckpt.kernels.transform import Transform
from fastckpt.reading.chunk_reader import Reader
from fastckpt.upkeep.compact.stored_state import used_rows
from fastckpt.writing.chains import bases_of, costs_of, needed_by


@dataclass
class StoredAs:
    """See the module. Of several ranks: their sums."""

    earlier_bytes: int = 0
    """Stored bytes that are needed from packs of earlier saves."""
    read_bytes: int = 0
    """Stored bytes that a restore reads."""
    full_bytes: int = 0
    """Stored bytes of the same state in full, as far as the index tells: those at the ends of its chains."""
    longest_chain: int = 0
    """The most differences that have to be decoded one after another."""
    transforms: dict[str, dict[str, int]] = field(default_factory=dict)
    """`chunks`, `raw_bytes` and `stored_bytes` by what became of chunks; bases that only others need are apart."""

    @property
    def amplification(self) -> float:
        """Bytes that a restore reads, against those of a full checkpoint."""
        return self.read_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def is_full(self) -> bool:
        """Whether no pack of another save is needed."""
        return not self.earlier_bytes

    def add(self, other: StoredAs) -> None:
        """Count another rank in."""
        self.earlier_bytes += other.earlier_bytes
        self.read_bytes += other.read_bytes
        self.full_bytes += other.full_bytes
        self.longest_chain = max(self.longest_chain, other.longest_chain)
        for name, numbers in other.transforms.items():
            mine = self.transforms.setdefault(name, dict.fromkeys(numbers, 0))
            for key, value in numbers.items():
                mine[key] += value


def stored_as(reader: Reader, save: SaveId) -> StoredAs:
    """Of one vote. save: whose it is."""
    return of_rows(reader.records, used_rows(reader), reader.files, save)


def of_rows(rows: Records, used_rows: Sequence[int], files: Sequence[FileEntry], save: SaveId) -> StoredAs:
    """Of the rows of one index. used_rows: those that storages use. files: its file table."""
    used = np.array(used_rows, np.int64)
    bases = bases_of(rows)
    is_used = np.zeros(len(rows), bool)
    is_used[used] = True
    needed = is_used | needed_by(bases, used)
    own = np.array([True, *(parse_pack(file.key) == save for file in files)])[rows["file"]]
    places = _first_of_each(rows[["file", "offset"]]) & (rows["stored_bytes"] > 0)
    stored = rows["stored_bytes"].astype(np.int64)
    costs = costs_of(rows, bases)
    is_cast = rows["transform"] == Transform.CAST  # in a full checkpoint, too
    alone = is_used & ~is_cast & _first_of_each(rows[["digest", "raw_bytes"]], is_used)
    found = StoredAs(
        earlier_bytes=int(stored[needed & ~own & places].sum()),
        read_bytes=int(stored[needed & places].sum()),
        full_bytes=round(float(costs.full_bytes[alone].sum())),
        longest_chain=int(costs.depth[is_used & ~is_cast].max(initial=0)),
    )
    for number in np.flatnonzero(needed).tolist():
        _enter(found, rows[number], is_used=bool(is_used[number]), is_own=bool(own[number]), first=bool(places[number]))
    return found


def _first_of_each(values: Any, of: Any = None) -> Any:
    """A mask of the first row with each value, among the rows `of` (None: all)."""
    rows = np.arange(len(values)) if of is None else np.flatnonzero(of)
    found = np.zeros(len(values), bool)
    seen: set[bytes] = set()
    for row in rows.tolist():
        value = values[row].tobytes()
        found[row] = value not in seen
        seen.add(value)
    return found


def _enter(found: StoredAs, record: Any, *, is_used: bool, is_own: bool, first: bool) -> None:
    stores = bool(record["stored_bytes"])
    name = transform_of(record) if is_used else "base of others"
    if is_used and stores and not is_own:
        name = f"{name} of earlier saves"
    elif is_used and stores and not first:
        name = "equal to another"
    numbers = found.transforms.setdefault(name, {"chunks": 0, "raw_bytes": 0, "stored_bytes": 0})
    numbers["chunks"] += 1
    numbers["raw_bytes"] += int(record["raw_bytes"])
    numbers["stored_bytes"] += int(record["stored_bytes"]) if first else 0


__all__ = ["StoredAs", "of_rows", "stored_as"]
