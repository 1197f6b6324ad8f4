"""The memory of packs."""

from __future__ import annotations

from fastckpt._types import U8
from fastckpt.host.pages import fresh_pages


class PackBuffers:
    """Memory for packs, kept from save to save: allocating fresh pages costs three times as much as filling them. Used by one save at a
    time, under its lock.
    """

    def __init__(self) -> None:
        self._free: list[U8] = []
        self._n_bytes = self._most = self._taken = 0

    def begin(self, n_bytes: int, most: int) -> None:
        """A save begins, which needs buffers of n_bytes, `most` at a time. Others than these are freed."""
        self._free = [one for one in self._free if n_bytes <= one.size <= 2 * n_bytes][:most]
        self._n_bytes, self._most, self._taken = n_bytes, most, 0

    def take(self, at_once: int) -> U8 | None:
        """A buffer; None while all are in use, or `at_once` of them."""
        if self._taken >= min(self._most, at_once):
            return None
        buffer = self._free.pop() if self._free else fresh_pages(self._n_bytes)
        self._taken += 1
        return buffer

    def give_back(self, buffer: U8) -> None:
        """Take back a buffer that nobody uses any more."""
        self._taken -= 1
        self._free.append(buffer)

    def drop(self) -> None:
        """Free the memory; there will be no other save."""
        self._free = []
