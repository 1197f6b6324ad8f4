"""A store in this process's memory: for tests, and as the simplest implementation of the contract."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastckpt.errors import ObjectChangedError, ObjectExistsError, ObjectNotFoundError
from fastckpt.store.base import ObjectInfo, Store, check_key, check_prefix


class MemoryStore(Store):
    """Objects in a dict of this process. For tests; `open_store("memory://name")` gives the same store for the same name."""

    def __init__(self, clock: Callable[[], float] = time.time, name: str = "memory") -> None:
        """Make an empty store.

        Args:
            clock: gives the store's own time, in seconds since 1970.
            name: of the store, for its URL in messages.
        """
        self.url = f"memory://{name}"
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._versions: dict[str, int] = {}
        """How often each key was written."""

    def put(self, key: str, data: Any) -> None:
        check_key(key)
        copy = bytes(memoryview(data).cast("B"))
        with self._lock:
            self._write(key, copy)

    def _write(self, key: str, copy: bytes) -> None:
        """Under the lock."""
        self._objects[key] = copy, self._clock()
        self._versions[key] = self._versions.get(key, 0) + 1

    def put_if_absent(self, key: str, data: Any) -> None:
        check_key(key)
        copy = bytes(memoryview(data).cast("B"))
        with self._lock:
            if key in self._objects:
                raise ObjectExistsError(f"{self.url}/{key} exists already")
            self._write(key, copy)

    def get_version(self, key: str) -> tuple[bytes, str]:
        check_key(key)
        with self._lock:
            found, version = self._objects.get(key), self._versions.get(key, 0)
        if found is None:
            raise ObjectNotFoundError(f"{self.url}/{key} does not exist")
        return found[0], str(version)

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        check_key(key)
        copy = bytes(memoryview(data).cast("B"))
        with self._lock:
            if key not in self._objects:
                raise ObjectNotFoundError(f"{self.url}/{key} does not exist")
            if str(self._versions[key]) != version:
                raise ObjectChangedError(f"{self.url}/{key} is not the version that was read")
            self._write(key, copy)

    def _find(self, key: str) -> tuple[bytes, float]:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectNotFoundError(f"{self.url}/{key} does not exist")
        return found

    def get(self, key: str) -> bytes:
        return self._find(key)[0]

    def get_into(self, key: str, offset: int, out: Any) -> None:
        data, _ = self._find(key)
        view = memoryview(out).cast("B")
        part = data[offset : offset + view.nbytes]
        view[: len(part)] = part
        if len(part) < view.nbytes:
            raise EOFError(f"{self.url}/{key} has {len(data)} bytes: expected {offset + view.nbytes} or more")

    def head(self, key: str) -> ObjectInfo:
        data, modified_s = self._find(key)
        return ObjectInfo(key, len(data), modified_s)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [ObjectInfo(k, len(d), at) for k, (d, at) in self._objects.items() if k.startswith(prefix)]
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)
