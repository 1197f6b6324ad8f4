"""What a save may refer to instead of sending it: the chunks of one committed checkpoint, and their bytes as far as memory keeps them.

committed checkpoint ─→ Base ─→ next save: equal chunks are named again, changed ones are stored as differences
  rows, packs, places     └─ bytes, while memory keeps them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastckpt._types import U8
from fastckpt.format.directory import FileEntry, StorageEntry, TensorEntry
from fastckpt.format.records import Records
from fastckpt.format.repository_records import Parent
from fastckpt.format.sealed_state import SealedChunk, SealedState
from fastckpt.format.vote import Vote


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
    digests: Mapping[int, bytes] = field(default_factory=dict)
    """Of chunks that are not one whole row, by number: the digest of the bytes that `memory` was given."""


class Uploaded(NamedTuple):
    """What an upload has placed: together with the state's form, all that a Base of it needs once it is committed."""

    vote: Vote
    records: Records
    """The rows of the vote's index."""
    rows: Sequence[Place | None]
    """Where each chunk of the sealed state is stored."""
    saved: Mapping[int, float] = {}
    """Of each chunk that was compared with the base's bytes: the part of its full stored bytes that these have saved."""

    def as_base(self, sealed: SealedState, parent: Parent, memory: BaseBytes | None, seen_s: float) -> Base:
        """The base of the next save, once this one was acknowledged.

        Args:
            sealed: the state that was uploaded.
            parent: the checkpoint that it has become.
            memory: the state's bytes, as far as they are kept.
            seen_s: time.monotonic() before the acknowledgement.
        """
        form = sealed.storages, sealed.tensors, sealed.chunks
        return Base(parent, *form, self.rows, self.records, self.vote.files, memory, seen_s)
