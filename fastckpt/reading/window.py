"""The storages in memory that were not taken yet, while a load is under way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt._types import U8
from fastckpt.host.pages import fresh_pages

_ALIGNMENT_BYTES = 64
_MAPPED_BYTES = 1 << 20


def _new_memory(n_bytes: int) -> U8:
    """New memory for one storage, aligned as torch aligns its own."""
    if n_bytes >= _MAPPED_BYTES:
        return fresh_pages(n_bytes)
    room = np.empty(n_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -room.__array_interface__["data"][0] % _ALIGNMENT_BYTES
    return room[start : start + n_bytes]


class Sink(Protocol):
    """Takes the bytes of a storage that lies out of the threads' reach, such as on a device. Any thread, several at once."""

    def room(self, position: int, n_bytes: int) -> AbstractContextManager[U8]:
        """Context with host memory for these bytes of the storage; at its end they are on their way. It may wait for memory."""


class Loading:
    """A storage in flight: its memory, and the number of chunks that are still missing."""

    def __init__(self, n_bytes: int, missing: int, given: U8 | Sink | None) -> None:
        self.sink = given if given is not None and not isinstance(given, np.ndarray) else None
        """Where the bytes go that `view` has no room for: then it is empty."""
        # NumPy's memory: a storage over it cannot be resized, like torch.load's. A resizable storage would let a hostile skeleton ask for a
        # tensor past its end, and read whatever fresh memory holds.
        self.view = given if isinstance(given, np.ndarray) else _new_memory(0 if self.sink is not None else n_bytes)
        self.address: int = self.view.__array_interface__["data"][0]
        self.is_fresh = given is None and n_bytes >= _MAPPED_BYTES
        """Nobody has touched its pages."""
        self.storage: UntypedStorage = torch.from_numpy(self.view).untyped_storage()
        self.missing = missing


class Window:
    """See the module. Under the loader's lock, except for `loading`."""

    def __init__(self, limit_bytes: int | None, given: Mapping[int, U8 | Sink]) -> None:
        """limit_bytes: the window is full from this size on; None: never. given: memory of the caller, or sinks, by number of
        storage.
        """
        self._limit_bytes = limit_bytes
        self._given = given
        self._held_bytes = 0
        self._loading: dict[int, Loading] = {}
        self._entered: set[int] = set()
        """Storages that have been given memory; each gets it only once."""

    @property
    def is_full(self) -> bool:
        """Whether storages that nobody waits for should stay out."""
        return self._limit_bytes is not None and self._held_bytes >= self._limit_bytes

    def enter(self, number: int, n_bytes: int, n_chunks: int) -> None:
        """Give a storage its memory, unless it has had it. n_chunks: number of chunks that have to arrive."""
        if number not in self._entered:
            self._entered.add(number)
            self._loading[number] = Loading(n_bytes, n_chunks, self._given.get(number))
            self._held_bytes += n_bytes

    def has_entered(self, number: int) -> bool:
        """Whether a storage has been given memory. For the thread that calls `enter`."""
        return number in self._entered

    def loading(self, number: int) -> Loading:
        """A storage in the window. Any thread."""
        return self._loading[number]

    def arrive(self, number: int) -> None:
        """One chunk of a storage is in place, or is known to be damaged."""
        self._loading[number].missing -= 1

    def __contains__(self, number: int) -> bool:
        """Whether a storage is in the window."""
        return number in self._loading

    def is_whole(self, number: int) -> bool:
        """Whether a storage has all its chunks. KeyError unless it is in the window."""
        return not self._loading[number].missing

    def take(self, number: int) -> UntypedStorage:
        """Take a storage out of the window."""
        storage = self._loading.pop(number).storage
        self._held_bytes -= storage.nbytes()
        return storage
