"""What a save may refer to instead of sending it: the chunks of one committed checkpoint, and their bytes as far as memory keeps them.

committed checkpoint ─→ Base ─→ next save: equal chunks are named again, changed ones are stored as differences
  rows, packs, places     └─ bytes, while memory keeps them
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastckpt._types import U8
from fastckpt.format.directory import FileEntry, StorageEntry, TensorEntry
from fastckpt.format.records import Records
from fastckpt.format.repository_records import Parent
from fastckpt.format.sealed_state import SealedChunk


class Place(NamedTuple):
    """Where a chunk's bytes are stored: in the raw bytes of a row from byte `start` on; they may end in the next row."""

    row: int
    start: int = 0


class BaseBytes(Protocol):
    """The raw bytes of a base's chunks, in host memory. Any thread."""

    def lend(self, chunk: int) -> AbstractContextManager[U8 | None]:
        """Context with a chunk's bytes, which stay as they are until it ends. None: memory does not keep them, or not any more."""


@dataclass(frozen=True)
class Base:
    """See the module. Its form (`storages`, `tensors`, `chunks`) is like that of a SealedState: extents count chunks, not rows."""

    parent: Parent
    """The checkpoint. While it lives, every pack of `files` that a row needs is there."""
    storages: Sequence[StorageEntry]
    tensors: Sequence[TensorEntry]
    chunks: Sequence[SealedChunk]
    places: Sequence[Place | None]
    """Where each chunk is stored. None: in more than two rows, or in rows that do not follow each other."""
    records: Records
    """All rows of the checkpoint's index (or of the indexes that were read together); bases come before what needs them."""
    files: tuple[FileEntry, ...]
    """The packs that the rows name: file n is files[n − 1]."""
    memory: BaseBytes | None = None
    seen_s: float = 0.0
    """time.monotonic() at which the checkpoint was last known to live."""
