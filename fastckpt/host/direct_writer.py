"""Writes a file from front to back past the page cache, where the file system supports it."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastckpt.host.pages import fresh_pages
from fastckpt.host.threads import WorkerPool

_WRITE_BYTES = 16 << 20  # Linux writes at most 2 GiB - 4 KiB in one call; a smaller step also lets signals through
_DIRECT_BYTES = 4 << 20
_WHOLE_BYTES = 1 << 20
"""Aligned memory of so many bytes is written from where it lies: the last packs of a save are shorter than a buffer."""
_BLOCK_BYTES = 4096


def write_all(fd: int, data: Any) -> None:
    """Write the whole buffer, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        view = view[os.write(fd, view[:_WRITE_BYTES]) :]


class DirectWriter:
    """One open file, written front to back. Used by one thread; takes one more of its own once a buffer is full.

    What is synced at once anyway gains nothing there: through the cache, 420 MB cost 110 ms of a processor that training wants, past it 15,
    and the disk works from the first megabytes on, not from the fsync on (ext4 on a virtual disk, 2 cores). Direct writes want whole blocks
    from aligned memory, which is written from where it lies if it is long enough. What comes in other pieces is joined in one of two
    buffers while a thread writes the other; what does not fill one goes the ordinary way.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct: bool | None = None
        """None: direct writing was not tried yet."""
        self._rooms: list[NDArray[np.uint8]] = []
        self._filled = 0
        self._writer: WorkerPool | None = None
        self._pending: Future[None] | None = None

    def write(self, data: Any) -> None:
        """Append a buffer. On return the caller may reuse it."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            if self._direct is False and not self._filled:
                self._settle()
                write_all(self._fd, view)
                return
            if not self._filled and view.nbytes >= _WHOLE_BYTES and _address(view) % _BLOCK_BYTES == 0:
                whole = view.nbytes // _BLOCK_BYTES * _BLOCK_BYTES
                self._settle()
                self._write_blocks(view[:whole])
                view = view[whole:]
                continue
            if not self._rooms:
                self._rooms = [fresh_pages(_DIRECT_BYTES) for _ in range(2)]
            n = min(_DIRECT_BYTES - self._filled, view.nbytes)
            # np.copyto releases the GIL; otherwise the other thread would not even begin.
            np.copyto(self._rooms[0][self._filled : self._filled + n], np.frombuffer(view[:n], np.uint8))
            self._filled, view = self._filled + n, view[n:]
            if self._filled == _DIRECT_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        self._settle()
        if self._writer is None:
            self._writer = WorkerPool(1, "fastckpt-write")
        self._pending = self._writer.submit(functools.partial(self._write_blocks, self._rooms[0].data))
        self._rooms.reverse()
        self._filled = 0

    def _settle(self) -> None:
        """Wait until the buffer in flight is written. Raises the error of that write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def flush(self) -> None:
        """Write the remaining bytes; nothing may be written after this."""
        self._settle()
        if self._filled:
            if self._direct:
                self._set_direct(False)
            write_all(self._fd, self._rooms[0][: self._filled])
        self.close()

    def close(self) -> None:
        """End the writing thread. May be called twice."""
        if self._writer is not None:
            self._writer.close()
        self._rooms, self._filled, self._pending = [], 0, None

    def _write_blocks(self, view: memoryview) -> None:
        if self._direct is None:
            self._set_direct(True)
        while view.nbytes:
            try:
                n = os.write(self._fd, view[:_WRITE_BYTES])
            except OSError as error:
                # The device has larger blocks than ours, or a short write left the file position in the middle of a block.
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(False)
                continue
            view = view[n:]

    def _set_direct(self, wanted: bool) -> None:
        flag = getattr(os, "O_DIRECT", 0)  # macOS has none
        if flag:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
            except OSError:  # file systems in memory and FUSE may refuse it
                wanted = False
        self._direct = wanted and bool(flag)


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data
