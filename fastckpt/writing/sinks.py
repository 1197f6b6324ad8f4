"""Sinks of this machine other than a file that is replaced; and the choice of the sink for a path."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Any

from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.host.direct_writer import write_all
from fastckpt.host.files import AtomicFile, naming
from fastckpt.host.held import descriptor_of, held_for_writing, held_open, is_own, why_not_replaced
from fastckpt.host.sink import Sink

_OBJECT_WRITE_BYTES = 4 << 20  # bytes that are copied for one call of a caller's `write`


class DirectFile:
    """A Sink for a path whose target cannot be replaced: a device, a pipe, the name of a descriptor, an empty file that somebody holds
    open, or an empty file in a directory that we may not write to (docs/guarantees.md, §6). A file that holds bytes is never written in
    place.

    Not atomic: somebody who reads it meanwhile sees a part. A file that was empty is emptied again if the save fails.
    """

    def __init__(self, path: str, fd: int | None = None, *, empty: bool = False) -> None:
        """fd: an open descriptor, closed at the end; None: the path is opened at the first write, because opening a pipe waits for its
        reader. empty: the target is a file without bytes.
        """
        self._path, self._fd, self.empty = path, fd, empty
        self.absolute_path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self._written = False

    def write(self, data: Any) -> None:
        with naming(self._path):
            if self._fd is None:
                self._fd = _open_to_write(self.absolute_path)
            if self.empty and not self._written and os.fstat(self._fd).st_size:
                raise SaveError(
                    f"{self._path} was empty when the save began and holds bytes now: a file that holds bytes is not written in place. "
                    "Save again"
                )
            self._written = True
            write_all(self._fd, data)

    def commit(self) -> None:
        assert self._fd is not None
        with naming(self._path):
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.fsync(self._fd)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def abandon(self) -> None:
        try:
            if self.empty and self._written and self._fd is not None:
                os.ftruncate(self._fd, 0)
            self._close()
        except OSError as error:
            logger.warning("closing the unfinished output %s failed: %s", self._path, error)


class FileObject:
    """A Sink for a caller's writable object: needs `write` and `flush`, no seek. It stays open; its owner makes it durable."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            # Pass bytes, not a view: a writer may keep what it is given, and our buffers are used again.
            piece = bytes(view[:_OBJECT_WRITE_BYTES])
            written = self._target.write(piece)
            if written is None:  # torch accepts writers that return nothing; such a writer has taken all bytes
                written = len(piece)
            if type(written) is not int or not 0 < written <= len(piece):
                raise SaveError(
                    f"{type(self._target).__name__}.write returned {written!r} for {len(piece)} bytes: expected None or "
                    "the number of bytes that it took"
                )
            view = view[written:]

    def commit(self) -> None:
        self._target.flush()

    def abandon(self) -> None:
        """Nothing to do: bytes that were written to the object cannot be taken back."""


def open_sink(path: str) -> Sink:
    """Choose the sink for a path of this machine. OSError, SaveError."""
    descriptor = descriptor_of(path)
    if descriptor is not None and is_own(descriptor[0]):
        return _of_descriptor(path, descriptor[1])
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return AtomicFile(path)
    if stat.S_ISDIR(found.st_mode):
        return AtomicFile(path)  # raises the error that names the reason
    if not stat.S_ISREG(found.st_mode):
        return DirectFile(path, None if stat.S_ISFIFO(found.st_mode) else _open_to_write(path))
    if descriptor is not None:
        why: tuple[int, str] | None = (errno.EBUSY, f"it is open in process {descriptor[0]} and is named as that")
    else:
        why = why_not_replaced(os.path.realpath(path), found)
    if not found.st_size and (why or held_open(path)):
        return DirectFile(path, _open_to_write(path), empty=True)
    if why:
        number, words = why
        raise OSError(
            number,
            f"{os.strerror(number)}: {words}. It holds {found.st_size} bytes, and these are not overwritten in place, where a save that "
            "fails would destroy them. Save to another directory; or give the file itself, which is not atomic then: open(path, 'wb')",
            path,
        )
    writing = held_for_writing(found)
    if writing is not None:
        logger.warning(
            "%s is open for writing in this process (descriptor %d), and the save puts a new file in its place: what is open there stays "
            "the old one. Open it again, or save to the file object",
            path,
            writing,
        )
    return AtomicFile(path)


def _of_descriptor(path: str, number: int) -> Sink:
    """Write through a copy of the descriptor: at its position, even if the original is closed meanwhile."""
    try:
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, f"descriptor {number} is open for reading only", path)
        fd = os.dup(number)
    except OSError as error:
        if error.filename is None:
            raise FileNotFoundError(errno.ENOENT, f"there is no descriptor {number}", path) from error
        raise
    return DirectFile(path, fd)


def _open_to_write(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
