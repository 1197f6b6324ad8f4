"""Sources of a container, readable by position: a path, or a caller's file object."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
from contextlib import AbstractContextManager
from typing import Any, Protocol

from fastckpt.errors import CheckpointError

_PROBES = 16  # takes microseconds
COLD_READS = 8
"""Reads of a file that wait for the disk at once."""
MARKER = "fastckpt.json"
"""The name whose presence makes a directory a repository (a copy of format.keys.MARKER)."""


class Source(Protocol):
    """Bytes, readable by position. Several threads may call `read_into` and `opened` at once."""

    name: str
    n_bytes: int

    @property
    def is_file(self) -> bool:
        """Whether `opened` gives a descriptor."""

    @property
    def is_remote(self) -> bool:
        """Whether each read asks a server: then some take much longer than others, and a second try may be faster."""

    def read_into(self, offset: int, out: Any) -> None:
        """Fill the writable buffer `out` from `offset` on. EOFError if the source ends before that."""

    def opened(self) -> AbstractContextManager[int]:
        """A descriptor whose bytes may be read by position while the context is open. Only of a source that is a file."""

    def reads_at_once(self) -> int:
        """How many reads under way are worth it, because each waits: for a disk some, for a server many. 0: reads do not wait."""

    def doubt(self) -> bool:
        """Note that what was read is not what it should be. Returns whether the next read comes from another place, and may be right."""

    def close(self) -> None:
        """Release the source; a caller's file object stays open."""


class NoFile:
    """Mixed into sources that have no descriptor, and whose reads do not wait."""

    is_file = False
    is_remote = False

    def opened(self) -> AbstractContextManager[int]:
        """See `Source`."""
        raise io.UnsupportedOperation(f"{type(self).__name__} has no descriptor")

    def reads_at_once(self) -> int:
        """See `Source`."""
        return 0

    def doubt(self) -> bool:
        """See `Source`."""
        return False


def is_cold(fd: int, n_bytes: int) -> bool:
    """Whether some of a few sampled bytes of a file are missing from the page cache."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = bytearray(1)
    try:
        for n in range(_PROBES):
            os.preadv(fd, [byte], n_bytes * n // _PROBES, os.RWF_NOWAIT)
    except OSError:  # the read would have to wait (BlockingIOError), or the file system cannot tell
        return True
    return False


class PathSource:
    """A regular file. Raises the errors of `open`: FileNotFoundError, IsADirectoryError, PermissionError."""

    is_file = True
    is_remote = False

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

    def opened(self) -> AbstractContextManager[int]:
        return contextlib.nullcontext(self._fd)

    def reads_at_once(self) -> int:
        return COLD_READS if is_cold(self._fd, self.n_bytes) else 0

    def doubt(self) -> bool:
        return False

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


class FileObjectSource(NoFile):
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

    def seek_to(self, offset: int) -> None:
        """Move the caller's file to this position."""
        self._file.seek(self.base + offset)

    def close(self) -> None:
        pass
