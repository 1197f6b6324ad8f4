"""A container as one object of a store: gathered on this side, then one put."""

from __future__ import annotations

import logging
import mmap
import tempfile
from typing import Any

from fastckpt.store import late_writes
from fastckpt.store.base import Store

logger = logging.getLogger("fastckpt")

_IN_MEMORY_BYTES = 64 << 20


class ObjectSink:
    """A Sink over one key. What is written is gathered in memory, past 64 MiB in an unnamed temporary file ($TMPDIR); the object appears
    whole with `commit`.

    One put can be at most 5 GiB on S3; states larger than that belong into a repository (Checkpointer), whose packs upload while
    they are encoded. Owns the store if `owns_store`.
    """

    def __init__(self, store: Store, key: str, *, owns_store: bool = True) -> None:
        self._store = store
        self._key = key
        self._owns_store = owns_store
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by commit or abandon

    def write(self, data: Any) -> None:
        self._spool.write(memoryview(data).cast("B"))

    def commit(self) -> None:
        age_s = late_writes.age_s(self._store.url, self._key)
        self._put()
        if age_s is not None:
            logger.warning(
                "%s/%s is saved, but a write of it by an earlier save of this process ended %.0f s ago without an answer. Should it still "
                "arrive, the older state replaces this one. Save to another name, or use a Checkpointer, which never writes one name twice",
                self._store.url,
                self._key,
                age_s,
            )
        self._close()

    def _put(self) -> None:
        n_bytes = self._spool.tell()
        if n_bytes <= _IN_MEMORY_BYTES:
            self._spool.seek(0)
            self._store.put(self._key, self._spool.read())
        else:
            self._spool.flush()
            with mmap.mmap(self._spool.fileno(), n_bytes, access=mmap.ACCESS_READ) as mapped:
                self._store.put(self._key, mapped)

    def _close(self) -> None:
        self._spool.close()
        if self._owns_store:
            self._store.close()

    def abandon(self) -> None:
        self._close()
