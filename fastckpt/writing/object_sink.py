"""A container as one object of a store: gathered on this machine, then sent with one put."""

from __future__ import annotations

import contextlib
import errno
import mmap
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from fastckpt.errors import StoreError, StoreFullError
from fastckpt.events import logger
from fastckpt.store import late_writes
from fastckpt.store.base import Store

_IN_MEMORY_BYTES = 64 << 20


class ObjectSink:
    """A Sink over one key. Written bytes are gathered in memory, and beyond 64 MiB in an unnamed temporary file ($TMPDIR); `commit` makes
    the whole object appear at once.

    One put can be at most 5 GiB on S3; a larger object is refused as soon as it passes that size. Save larger states to a repository
    (Checkpointer), which uploads packs while it encodes. Owns the store if `owns_store`.
    """

    def __init__(self, store: Store, key: str, *, owns_store: bool = True) -> None:
        self._store = store
        self._key = key
        self._owns_store = owns_store
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by commit or abandon

    def expect(self, raw_bytes: int) -> None:
        """Warn if a state of this size is likely to be too large; the exact size is known only after most of it is encoded."""
        most = self._store.most_put_bytes
        if most is not None and raw_bytes > most:
            logger.warning(
                "a state of %.1f GB goes into one object, %s/%s, which holds at most %.1f GB: unless it compresses to that, the save will "
                "be refused. A Checkpointer has no such limit",
                raw_bytes / 1e9,
                self._store.url,
                self._key,
                most / 1e9,
            )

    def write(self, data: Any) -> None:
        """StoreFullError if $TMPDIR is full, StoreError if the object becomes larger than the store takes."""
        view = memoryview(data).cast("B")
        most = self._store.most_put_bytes
        if most is not None and self._spool.tell() + view.nbytes > most:
            raise StoreError(
                f"{self._store.url}/{self._key} would have more than {most} bytes, which one PUT cannot carry; nothing was sent. Use a "
                "Checkpointer, whose objects are small, or save the parts of the state one by one"
            )
        with self._room():
            self._spool.write(view)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreFullError(
                f"{self._store.url}/{self._key} is gathered in {tempfile.gettempdir()} before it is sent, and there is no room for it: "
                f"{error.strerror}. Set $TMPDIR to a directory on a larger disk, or use a Checkpointer, which sends while it encodes"
            ) from error

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
            with self._room():
                self._spool.flush()
            mapped = mmap.mmap(self._spool.fileno(), n_bytes, access=mmap.ACCESS_READ)
            try:
                self._store.put(self._key, mapped)
            except BaseException as error:
                _let_go(error)
                raise
            finally:
                with contextlib.suppress(
                    BufferError
                ):  # somebody still uses a view of it: it is closed when they have finished
                    mapped.close()

    def _close(self) -> None:
        self._spool.close()
        if self._owns_store:
            self._store.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # close may try to write the rest, for which there is no space
            self._spool.close()
        self._close()


def _let_go(error: BaseException | None) -> None:
    """Clear the frames of a failed put: their views of the file would occupy the disk as long as somebody keeps the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
