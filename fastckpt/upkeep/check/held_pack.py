"""A pack in memory while its chunks are checked: one request for each pack, however many chunks it has."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.errors import ObjectNotFoundError
from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.store.base import Store


class HeldPack:
    """The pack whose chunks a thread is checking, in its memory: a pack is one request, however many chunks it has."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._local = threading.local()

    def source(self, file: FileEntry) -> HeldSource:
        return HeldSource(self._store, file, self._local)

    def hold(self, key: str, n_bytes: int) -> int | None:
        """Read a pack whole. Returns its crc64nvme; None if it went or shrank meanwhile."""
        data = np.empty(n_bytes, np.uint8)
        try:
            self._store.get_into(key, 0, data)
        except (EOFError, ObjectNotFoundError):
            return None
        self._local.key, self._local.data = key, data
        return crc64nvme(data)

    def release(self) -> None:
        self._local.key, self._local.data = None, None


class HeldSource:
    """A Source: a pack, from this thread's memory if it is held there."""

    def __init__(self, store: Store, file: FileEntry, local: threading.local) -> None:
        self.name = f"{store.url}/{file.key}"
        self.n_bytes = file.n_bytes
        self._store, self._key, self._local = store, file.key, local

    def read_into(self, offset: int, out: Any) -> None:
        if getattr(self._local, "key", None) != self._key:
            self._store.get_into(self._key, offset, out)
            return
        data: npt.NDArray[np.uint8] = self._local.data
        view = np.frombuffer(out, np.uint8)
        if offset + view.size > data.size:
            raise EOFError(f"{self.name} has {data.size} bytes: expected {offset + view.size} or more")
        view[:] = data[offset : offset + view.size]

    def is_cold(self) -> bool:
        return False

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Packs are read whole."""

    def close(self) -> None:
        pass
