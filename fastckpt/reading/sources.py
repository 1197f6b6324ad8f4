"""Sources of a container, readable by position: a path, or a caller's file object."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
from typing import Any, Protocol

from fastckpt.errors import CheckpointError

_PROBES = 16  # takes microseconds
MARKER = "fastckpt.json"
"""The name whose presence makes a directory a repository (a copy of format.keys.MARKER)."""


class Source(Protocol):
    """Bytes, readable by position. Several threads may call `read_into` at once."""

    name: str
    n_bytes: int

    def read_into(self, offset: int, out: Any) -> None:
        """Fill the writable buffer `out` from `offset` on. EOFError if the source ends before that."""

    def is_cold(self) -> bool:
        """Whether reads will probably wait for a disk. Then hints by `prefetch`, and more readers than cores, are worth it."""

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """A hint: these bytes will be needed soon. Any thread."""

    def close(self) -> None:
        """Release the source; a caller's file object stays open."""


class PathSource:
    """A regular file. Raises the errors of `open`: FileNotFoundError, IsADirectoryError, PermissionError."""

    def __init__(self, path: str | bytes) -> None:
        self.name = os.fsdecode(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(self._fd)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, _why_no_directory(self.name), self.name)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(
                    f"{self.name} is no regular file: a checkpoint is read back to front. Copy it to a file"
                )
            self.n_bytes = found.st_size
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        while view.nbytes:
            n = os.preadv(self._fd, [view], offset)
            if n == 0:
                raise EOFError(f"{self.name} ends at byte {offset}: {view.nbytes} more were expected")
            view, offset = view[n:], offset + n

    def is_cold(self) -> bool:
        """Whether some of a few sampled bytes are missing from the page cache."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        byte = bytearray(1)
        try:
            for n in range(_PROBES):
                os.preadv(self._fd, [byte], self.n_bytes * n // _PROBES, os.RWF_NOWAIT)
        except OSError:  # the read would have to wait (BlockingIOError), or the file system cannot tell
            return True
        return False

    def prefetch(self, offset: int, n_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # the file system may have no page cache; then there is no hint
                os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _why_no_directory(path: str) -> str:
    """The system's own words come first: programs search for them."""
    if not os.path.exists(os.path.join(path, MARKER)):
        return "Is a directory, where the file of a checkpoint is expected"
    return (
        f"Is a directory with a repository of checkpoints ({MARKER}), where a file is expected: "
        "fastckpt.Checkpointer(…).restore() continues from it, `fastckpt restore` writes a checkpoint of it as a file"
    )


class FileObjectSource:
    """A seekable file object, from its present position to its end. Offsets count from that position."""

    def __init__(self, file: Any) -> None:
        self.name = str(getattr(file, "name", None) or f"<{type(file).__name__}>")
        self._file = file
        self._lock = threading.Lock()
        self.base = file.tell()
        file.seek(0, io.SEEK_END)
        self.n_bytes = max(0, file.tell() - self.base)
        file.seek(self.base)

    def read_into(self, offset: int, out: Any) -> None:
        view = memoryview(out).cast("B")
        readinto = getattr(self._file, "readinto", None)
        with self._lock:
            self._file.seek(self.base + offset)
            while view.nbytes:
                if readinto is not None:
                    n = readinto(view)
                else:
                    data = self._file.read(view.nbytes)
                    n = len(data)
                    view[:n] = data
                if not n:
                    raise EOFError(f"{self.name} ends: {view.nbytes} more bytes were expected")
                view = view[n:]

    def is_cold(self) -> bool:
        """Unknown; and a lock allows only one read at a time."""
        return False

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Does nothing: it is unknown what is behind the caller's object."""

    def seek_to(self, offset: int) -> None:
        """Move the caller's file to this position."""
        self._file.seek(self.base + offset)

    def close(self) -> None:
        pass
