"""What a base says is stored, read from the store: each chunk decoded from the rows that it names, and what memory keeps of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastckpt.format.directory import Directory
from fastckpt.reading.merged_reader import MergedReader
from fastckpt.reading.object_source import BytesSource, ObjectSource
from fastckpt.store.base import Store
from fastckpt.writing.bases import Base
from tests.support.host_training import SHORT_S


def settle() -> None:
    """Wait until all bytes of restored checkpoints are compared."""
    for thread in threading.enumerate():
        if thread.name == "fastckpt-base":
            thread.join(SHORT_S)


def chunks_of(base: Base, store: Store) -> Iterator[tuple[int, bytes | None, bytes | None]]:
    """Of each chunk: its bytes, what is stored for it, and what memory lends; None: nothing."""
    own: Any = SimpleNamespace(source=BytesSource(b"", "nothing"), start=0, footer=None, skeleton=b"")
    files = [ObjectSource(store, file.key, file.n_bytes) for file in base.files]
    table: Any = SimpleNamespace(chunks=base.records, files=base.files, sources=[own.source, *files], origins=[])
    reader = MergedReader(own, Directory((), ()), table, len(base.records))
    for number, (chunk, place) in enumerate(zip(base.chunks, base.places, strict=True)):
        stored = None
        if place is not None:
            rows = b"".join(_row(reader, row) for row in range(place.row, min(place.row + 2, len(base.records))))
            stored = rows[place.start : place.start + chunk.n_bytes]
        lent = None
        if base.memory is not None:
            with base.memory.lend(number) as found:
                lent = None if found is None else found.tobytes()
        yield chunk.n_bytes, stored, lent


def _row(reader: MergedReader, row: int) -> bytes:
    out = np.empty(int(reader.records["raw_bytes"][row]), np.uint8)
    damage = reader.read_chunk(row, out)
    assert damage is None, damage
    return out.tobytes()


def share_of(base: Base, store: Store, what: str = "lent") -> float:
    """The share of the raw bytes that is stored somewhere, or that memory has too; what is lent must be what is stored."""
    total = found = 0
    for n_bytes, stored, lent in chunks_of(base, store):
        total += n_bytes
        assert lent is None or lent == stored
        found += n_bytes if (lent if what == "lent" else stored) is not None else 0
    return found / total
