"""Spill file: holds slabs that must leave host memory before their chunks are uploaded, on a local disk, in an unnamed file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import IO, Any

from fastckpt._types import U8
from fastckpt.errors import SaveError
from fastckpt.format.digest import digest


class SpillFile:
    """Chunks in a file. A read returns exactly what was written, or raises an error: a bit that the disk flips must not get into a
    checkpoint. One thread writes, any thread may read.

    The file's pages in the kernel's cache are dropped at once: they would be host memory beyond the budget.
    """

    def __init__(self, directory: str) -> None:
        """SaveError if no file can be made there."""
        self._directory = directory = os.path.expanduser(directory)
        try:
            self._file: IO[Any] = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise SaveError(
                f"spill_dir {directory!r} cannot be used: {error.strerror or error}. Name a directory on a local disk that this process "
                "may write to, or leave it out"
            ) from error
        self._places: dict[int, tuple[int, bytes]] = {}
        self._end = 0

    def write(self, chunks: dict[int, U8]) -> None:
        """Append chunks, by their numbers. After an OSError none of these chunks can be read."""
        start = at = self._end
        places = {}
        for number, content in chunks.items():
            places[number] = (at, digest(content))
            left = content.data
            while left.nbytes:
                n = os.pwrite(self._file.fileno(), left, at)
                left, at = left[n:], at + n
        os.fdatasync(self._file.fileno())  # only clean pages can be dropped
        self._forget_pages(start, at - start)
        self._places.update(places)
        self._end = at

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def read(self, number: int, out: U8) -> None:
        """Fill `out`, which is as long as the chunk. SaveError if the bytes differ from what was written."""
        start, expected = self._places[number]
        at, left = start, out.data
        while left.nbytes:
            n = os.preadv(self._file.fileno(), [left], at)
            if not n:
                break
            left, at = left[n:], at + n
        self._forget_pages(start, out.size)
        found = digest(out)
        if left.nbytes or found != expected:
            raise SaveError(
                f"spill_dir {self._directory!r}: chunk {number} came back as {found.hex()}, {left.nbytes} bytes short: expected "
                f"{expected.hex()}. Nothing was committed. Look at that disk"
            )

    def _forget_pages(self, start: int, n_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), start, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Delete the bytes. May be called twice."""
        self._file.close()
