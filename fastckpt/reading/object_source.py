"""Sources over an object of a store, and over bytes in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fastckpt.reading.sources import COLD_READS, NoFile, is_cold
from fastckpt.store.base import Store
from fastckpt.store.wrap import Wrapper

REMOTE_READS = 64
"""Ranges of objects that may be read at once: S3 gives some 80 MB/s to each connection."""
_HEAD_BYTES = 64  # a container's header
_TAIL_BYTES = 256 << 10
"""Footer and index of some thousand tensors. A request costs as much time as 256 KiB at 10 MB/s."""


class ObjectSource:
    """An object of a store, readable by position."""

    def __init__(
        self,
        store: Store,
        key: str,
        n_bytes: int | None = None,
        *,
        owns_store: bool = False,
        keeps_ends: bool = False,
    ) -> None:
        """Ask the store for the length, unless it is known.

        Args:
            store: has the object.
            key: of the object.
            n_bytes: its length. None: it is not known.
            owns_store: `close` closes the store.
            keeps_ends: for a container: what lies at its beginning and end is read in many small pieces, so it is read once, and kept.

        Raises:
            StoreError: the store does not say the length.
        """
        self._owns_store = owns_store
        self._keeps_ends = keeps_ends
        self._ends: dict[int, bytearray] = {}
        """Bytes that are kept, by their offset."""
        self.name = f"{store.url}/{key}"
        self._store = store
        self._key = key
        self.n_bytes = store.head(key).n_bytes if n_bytes is None else n_bytes

    def read_into(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        if self._keeps_ends and view.nbytes and not self.is_file:
            found = self._kept(offset, view.nbytes)
            if found is not None:
                view[:] = found
                return
        self._store.get_into(self._key, offset, view)

    def _kept(self, offset: int, n_bytes: int) -> memoryview | None:
        """Bytes at the ends, which are read first if need be. None: they lie elsewhere."""
        tail = max(0, self.n_bytes - _TAIL_BYTES)
        start, stop = (tail, self.n_bytes) if offset >= tail else (0, min(_HEAD_BYTES, tail))
        if not start <= offset <= offset + n_bytes <= stop:
            return None
        if start not in self._ends:
            end = bytearray(stop - start)
            self._store.get_into(self._key, start, end)
            self._ends[start] = end
        return memoryview(self._ends[start])[offset - start : offset - start + n_bytes]

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
            return min(REMOTE_READS, self._store.useful_connections or REMOTE_READS)
        with self.opened() as fd:
            return COLD_READS if is_cold(fd, self.n_bytes) else 0

    def doubt(self) -> bool:
        return isinstance(self._store, Wrapper) and self._store.doubt(self._key)

    def let_ends_go(self) -> None:
        """Keep nothing any more: what is read from now on comes from the store, so that a second try is one."""
        self._keeps_ends = False
        self._ends.clear()

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
