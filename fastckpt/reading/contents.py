"""What a `TensorReader` reads from: one container, or the checkpoint of many ranks (`reading.whole_contents`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.storage import UntypedStorage

from fastckpt.format.directory import Directory, TensorEntry
from fastckpt.format.tensor_names import Name
from fastckpt.format.wholes import Whole, Wholes
from fastckpt.options import Options
from fastckpt.reading.assembly import Target, assemble
from fastckpt.reading.chunk_reader import Reader, summary
from fastckpt.reading.lazy_views import View, lazy_views
from fastckpt.reading.reads import Reads
from fastckpt.reading.storage_loader import LastChunk, StorageLoader, check_size


class Storages(Protocol):
    """Some storages, in the order that they were asked for in. Used by one thread."""

    def has_data(self, number: int) -> bool:
        """False for a meta tensor's storage."""

    def take(self, number: int) -> UntypedStorage:
        """The storage in host memory, verified; the caller owns it. Called at most once for each number."""


class Contents(Protocol):
    """See the module. Used by one thread."""

    @property
    def name(self) -> str:
        """For errors."""

    @property
    def directory(self) -> Directory:
        """Storages and tensors; of a storage's extents only whether there are any counts."""

    @property
    def wholes(self) -> Mapping[Name, Whole]:
        """Of each tensor, which blocks of it are where."""

    @property
    def summary(self) -> dict[str, Any]:
        """See `TensorReader.summary`."""

    def ranks_of(self, name: Name) -> tuple[int, ...]:
        """Where each of several ranks had its own tensor of this name: the ranks. () for all others. May read."""

    def lazy_kinds_of(self, entry: TensorEntry) -> frozenset[str] | None:
        """See `reading.lazy_views`: what this tensor is. None: that cannot be said, though it may be something."""

    def require_fetchable(self, n_bytes: int) -> None:
        """TooLargeError, UnsupportedFormatError if a storage of so many bytes cannot be read here."""

    def storages(self, numbers: Sequence[int]) -> AbstractContextManager[Storages]:
        """Read some storages."""

    def assemble(self, targets: Sequence[Target]) -> Iterator[torch.Tensor]:
        """See `reading.assembly.assemble`."""

    def close(self) -> None:
        """Let go of what is behind."""


class OfContainer:
    """One container, or one rank's merged index."""

    def __init__(self, reader: Reader, options: Options) -> None:
        self.reader, self._options = reader, options
        self._last_chunk = LastChunk()

    @property
    def name(self) -> str:
        return self.reader.source.name

    @property
    def directory(self) -> Directory:
        return self.reader.directory

    @cached_property
    def wholes(self) -> Mapping[Name, Whole]:
        wholes = Wholes()
        wholes.add(self.directory.rank, self.directory)
        return wholes.found

    @property
    def summary(self) -> dict[str, Any]:
        return summary(self.reader)

    def ranks_of(self, name: Name) -> tuple[int, ...]:
        return ()

    def lazy_kinds_of(self, entry: TensorEntry) -> frozenset[str] | None:
        found = self._lazy_views
        view = (entry.storage, entry.offset, entry.shape, entry.stride)
        return None if found is None else found.get(view, frozenset())

    @cached_property
    def _lazy_views(self) -> Mapping[View, frozenset[str]] | None:
        return lazy_views(self.reader.skeleton)

    def require_fetchable(self, n_bytes: int) -> None:
        check_size(self.reader, n_bytes, self._options.max_load_bytes)
        self.reader.require_readable()

    def storages(self, numbers: Sequence[int]) -> StorageLoader:
        reads, threads = Reads.of(self._options), self._options.load_threads
        window_bytes = reads.window_bytes if len(numbers) > 1 else 0
        return StorageLoader(self.reader, threads, window_bytes, numbers, self._last_chunk, reads=reads)

    def assemble(self, targets: Sequence[Target]) -> Iterator[torch.Tensor]:
        threads = self._options.threads
        return assemble({self.directory.rank: self.reader}, targets, self._options, threads, stay=False)

    def close(self) -> None:
        self._last_chunk.release()
        self.reader.source.close()


__all__ = ["Contents", "OfContainer", "Storages"]
