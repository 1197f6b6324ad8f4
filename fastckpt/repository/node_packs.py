"""Packs that ranks of a machine have in common are fetched by one of them, whole, and read by the others in the cache.

claim (a file, created if absent) ─→ fetch ─→ crc64nvme ─→ cache ─→ others, who wait for it, but not for long
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import DATA, VOTES, SaveId
from fastckpt.repository.cache_folder import CacheFolder

_MOST_SHARED_BYTES = 64 << 20
"""More than any pack that fastckpt writes."""
_LEFT_FREE_BYTES = 1 << 30
"""Of the disk, that ranks leave free when they share."""
_CLAIM_S = 60.0
"""How long the claim of a rank counts that was killed."""
_PATIENCE_S = 20.0
"""How long a pack is waited for that another rank fetches; then the rank reads it for itself."""
_PAUSE_S = 0.01
_AT_ONCE = 2
"""Packs that a rank has in memory whole."""


class NodePacks:
    """One rank's part. Any thread."""

    def __init__(
        self,
        folder: CacheFolder,
        save: SaveId,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """save: the checkpoint's that will be read. Files of earlier saves are removed. RepositoryError, OSError."""
        CacheFolder.make(folder.root, folder.repository)
        self._folder = folder
        self._sleep, self._clock = sleep, clock
        self._at_once = threading.BoundedSemaphore(_AT_ONCE)
        for name in (DATA, VOTES):
            folder.remove_before(name.rstrip("/"), str(save))

    def leave(self, key: str, data: bytes) -> None:
        """Leave a vote for the others, who verify packs by it."""
        with contextlib.suppress(OSError):  # it is full: they read for themselves
            self._folder.put(key, data)

    def bring(self, file: FileEntry, read: Callable[[Any], None]) -> bool | None:
        """Have a pack in the cache: fetch it, unless another rank does. read: fills a buffer with the pack.

        True: it is there, and verified. None: another rank has brought it. False: it is not there; whoever needs it reads the store. Errors
        as those of `read`, but EOFError.
        """
        if not self._has_room(file):
            return False
        if self._folder.claim(file.key, _CLAIM_S):
            try:
                if self._folder.size(file.key) is not None:  # another rank has just let go
                    return None
                return self._fetch(file, read)
            finally:
                self._folder.let_go(file.key)
        end_s = self._clock() + _PATIENCE_S
        while self._folder.size(file.key) is None:
            if not self._folder.is_claimed(file.key) or self._clock() >= end_s:
                return None if self._folder.size(file.key) is not None else False
            self._sleep(_PAUSE_S)
        return None

    def _has_room(self, file: FileEntry) -> bool:
        try:
            return file.n_bytes <= _MOST_SHARED_BYTES and self._folder.free_bytes() >= _LEFT_FREE_BYTES
        except OSError:
            return False

    def _fetch(self, file: FileEntry, read: Callable[[Any], None]) -> bool:
        with self._at_once:
            data = bytearray(file.n_bytes)
            try:
                read(data)
                if crc64nvme(data) != file.crc64nvme:  # whoever reads it from the store is told where
                    return False
                self._folder.put(file.key, data)
            except (EOFError, OSError):
                return False
        return True


__all__ = ["NodePacks"]
