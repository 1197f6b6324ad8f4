"""Sources over an object of a store, and over bytes in memory."""

from __future__ import annotations

from typing import Any

from fastckpt.store.base import Store


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

    def is_cold(self) -> bool:
        return False

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Does nothing: a store is fast when many threads read at once."""

    def close(self) -> None:
        if self._owns_store:
            self._store.close()


class BytesSource:
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

    def is_cold(self) -> bool:
        return False

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Does nothing: the bytes are in memory."""

    def close(self) -> None:
        pass
