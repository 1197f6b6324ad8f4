"""Whether the bytes that were copied are those of the call of save.

torch counts in-place changes, but not those through `.data`, NumPy views or kernels of others. What chunks held at `save` against their
copies finds these too, where anything has really been overwritten: host memory by a sample of it (sampled.py) or by all of it, a device's
by fingerprints of all of it (device_prints.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastckpt.events import logger
from fastckpt.format.digest import digest
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.snapshot.device_prints import DevicePrints
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts

U8 = npt.NDArray[np.uint8]

_random = random.Random()  # of our own: drawing from the global one would change what training draws


class HostPrints(Protocol):
    """What chunks in host memory held."""

    def take(self, number: int) -> None:
        """Look at a chunk where it is. The thread that trains."""

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether a copy is what was looked at. True, too, where nothing was. Any thread."""


class AllBytes:
    """HostPrints of all bytes: one more reading of the state."""

    def __init__(self, captured: Captured, cuts: Cuts) -> None:
        self._captured, self._chunks = captured, cuts.chunks
        self._digests: dict[int, bytes] = {}
        self._scratch = np.empty(0, np.uint8)

    def take(self, number: int) -> None:
        """See `HostPrints`."""
        if not self._scratch.size:
            self._scratch = np.empty(MAX_RAW_BYTES, np.uint8)
        chunk = self._chunks[number]
        content = self._scratch[: chunk.n_bytes]
        self._captured.read(chunk.pieces, content)
        self._digests[number] = digest(content)

    def is_copy(self, number: int, content: U8) -> bool:
        """See `HostPrints`."""
        self._scratch = np.empty(0, np.uint8)
        return number not in self._digests or digest(content) == self._digests[number]


class SaveFingerprints:
    """What chunks held at the call of save. Made by the thread that trains; `is_copy` is for any."""

    def __init__(self, host: HostPrints | None = None) -> None:
        """None: nothing is looked at."""
        self._host = host
        self._prints: list[tuple[SideStream, DevicePrints]] = []

    @property
    def looks(self) -> bool:
        """Whether anything is to be looked at."""
        return self._host is not None

    def take_host(self, number: int) -> None:
        """A chunk in host memory."""
        if self._host is not None:
            self._host.take(number)

    def take_device(self, side: SideStream, chunks: Mapping[int, Sequence[torch.Tensor]]) -> bool:
        """Chunks on a device, by their numbers: each one's pieces. Computed on the caller's current stream. False: the device has no
        room for that, and nothing is known of them.
        """
        if not chunks:
            return True
        try:
            prints = DevicePrints(side.device, chunks, _random.getrandbits(63))
        except torch.OutOfMemoryError:
            logger.warning(
                "%s has no room for fingerprints: this snapshot is copied before `save` returns", side.device
            )
            return False
        self._prints.append((side, prints))
        return True

    def fetch(self) -> None:
        """Enqueue the copies of what was computed on devices, once their side streams have begun."""
        for side, prints in self._prints:
            prints.fetch(side)

    def is_host_copy(self, number: int, content: U8) -> bool:
        """Whether these are the bytes that a chunk in host memory held. True, too, where nothing is known of it."""
        return self._host is None or self._host.is_copy(number, content)

    def is_device_copy(self, number: int, content: U8) -> bool:
        """The same, of a chunk on a device."""
        return all(prints.is_copy(number, content) for _, prints in self._prints if number in prints)
