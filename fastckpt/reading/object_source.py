"""Sources over an object of a store, and over bytes in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fastckpt.reading.sources import COLD_READS, NoFile, is_cold
from fastckpt.store.base import Store

REMOTE_READS = 16
"""Ranges of objects that are read at once: S3 gives some 80 MB/s to each connection."""


class ObjectSource:
    """An object of a store, readable by position."""

    def __init__(self, store: Store, key: str, n_bytes: int | None = None, *, owns_store: bool = False) -> None:
        """n_bytes: its length, if known; None: the store is asked. StoreError's subclasses."""
        self._owns_store = owns_store
        self.name = f"{store.url}/{key}"
        self._store = store
        self._key = key
        self.n_bytes = store.head(key).n_bytes if n_bytes is None else n_bytes

    def read_into(self, offset: int, out: Any) -> None:
        self._store.get_into(self._key, offset, out)

    @property
    def is_file(self) -> bool:
        return self._store.has_files

    @property
    def is_remote(self) -> bool:
        return not self._store.has_files

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        fd = self._store.open_file(
            self._key
        )  # not kept: a checkpoint may have more packs than a process may have descriptors
        try:
            yield fd
        finally:
            os.close(fd)

    def reads_at_once(self) -> int:
        if not self.is_file:
            return REMOTE_READS
        with self.opened() as fd:
            return COLD_READS if is_cold(fd, self.n_bytes) else 0

    def close(self) -> None:
        if self._owns_store:
            self._store.close()


class BytesSource(NoFile):
    """Bytes in memory."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.n_bytes = len(data)
        self._data = data

    def read_into(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        part = self._data[offset : offset + view.nbytes]
        view[: len(part)] = part
        if len(part) < view.nbytes:
            raise EOFError(f"{self.name} ends at byte {self.n_bytes}: {offset + view.nbytes} or more were expected")

    def close(self) -> None:
        pass
