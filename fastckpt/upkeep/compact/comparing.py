"""Whether two indexes are of the same state, to the bit: by the digests of chunks; by the bytes where chunks are cut at other places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np

from fastckpt._types import U8
from fastckpt.errors import CorruptCheckpointError, Damage, SaveError
from fastckpt.format.keys import SaveId
from fastckpt.reading.chunk_reader import Reader


def require_same(old: Reader, new: Reader, save: SaveId) -> None:
    """SaveError unless the index of a save says of every byte the same as the one that was read. StoreError."""
    parts: tuple[tuple[str, object, object], ...] = (
        ("skeleton", old.skeleton, new.skeleton),
        ("tensors", old.directory.tensors, new.directory.tensors),
        ("storages", _forms(old), _forms(new)),
    )
    differ = [what for what, before, now in parts if before != now]
    if not differ:
        numbers = range(len(old.directory.storages))
        differ = [f"storage {number}" for number in numbers if not _is_same(old, new, number)]
    if differ:
        shown = [Damage("vote", what, "as in the checkpoint that was read", "a difference") for what in differ]
        raise SaveError(
            f"step {save.step} was not written again: what was written differs from what was read. Nothing is committed. Run it once "
            "more; if it fails again, a memory of this machine may be faulty"
        ) from CorruptCheckpointError(new.source.name, shown)


def _forms(reader: Reader) -> list[tuple[object, ...]]:
    return [(s.dtype, s.n_bytes, s.location, s.extents is None, s.shares, s.print) for s in reader.directory.storages]


def _is_same(old: Reader, new: Reader, storage: int) -> bool:
    for before, now in zip_longest(_digests(old, storage), _digests(new, storage)):
        if before is None or now is None or before[:2] != now[:2]:
            return _has_same_bytes(old, new, storage)  # a bundle of copies has become a row for each of them
        if before != now:
            return False
    return True


def _digests(reader: Reader, storage: int) -> Iterator[tuple[int, int, bytes]]:
    """Where each chunk of a storage begins in it, its length, and its digest."""
    for piece in reader.pieces(storage):
        record = reader.records[piece.chunk]
        yield piece.position - piece.offset, int(record["raw_bytes"]), record["digest"].tobytes()


def _has_same_bytes(old: Reader, new: Reader, storage: int) -> bool:
    """Reads both, a chunk at a time."""
    theirs, rest = _bytes(new, storage), np.empty(0, np.uint8)
    for part in _bytes(old, storage):
        at = 0
        while at < part.size:
            if not rest.size:
                rest = next(theirs, rest)
            n = min(rest.size, part.size - at)
            if not n or not np.array_equal(part[at : at + n], rest[:n]):
                return False
            at, rest = at + n, rest[n:]
    return not rest.size and next(theirs, None) is None


def _bytes(reader: Reader, storage: int) -> Iterator[U8]:
    for piece in reader.pieces(storage):
        raw = np.empty(int(reader.records["raw_bytes"][piece.chunk]), np.uint8)
        damage = reader.read_chunk(piece.chunk, raw)
        if damage is not None:
            raise CorruptCheckpointError(reader.source.name, [damage])
        yield raw[piece.offset : piece.offset + piece.n_bytes]


__all__ = ["require_same"]
