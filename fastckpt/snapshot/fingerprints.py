"""Takes fingerprints of chunks at the call of save, and compares copies with them.

torch counts in-place changes, but not those through `.data`, NumPy views or other libraries' kernels. Fingerprints find these, too, if
bytes have really changed. For host memory they cover a sample (sampled.py) or all bytes; for device memory all bytes (device_prints.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from fastckpt._types import U8
from fastckpt.events import logger
from fastckpt.format.digest import digest
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.snapshot.device_prints import DevicePrints
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts

_random = random.Random()  # of our own: drawing from the global one would change the numbers that training draws


class HostPrints(Protocol):
    """Fingerprints of chunks in host memory."""

    def take(self, number: int) -> None:
        """Take the fingerprint of a chunk in the live state. Called by the training thread."""

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether a copy has the same fingerprint. Also True if none was taken. Any thread."""

    def is_unchanged(self, number: int) -> bool:
        """Whether a chunk has the same fingerprint in the live state, whose memory must exist. Also True if none was taken, or if `is_copy`
        alone sees every change. Any thread.
        """


class AllBytes:
    """HostPrints of all bytes: costs one more pass over the state."""

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

    def is_unchanged(self, number: int) -> bool:
        """See `HostPrints`."""
        return True


class SaveFingerprints:
    """The fingerprints of one snapshot. Taken by the thread that trains; the comparisons are for any thread."""

    def __init__(self, host: HostPrints | None = None) -> None:
        """host: fingerprints for host memory; None: no fingerprints are taken, for devices neither."""
        self._host = host
        self._prints: list[tuple[SideStream, DevicePrints]] = []

    @property
    def looks(self) -> bool:
        """Whether fingerprints are taken."""
        return self._host is not None

    def take_host(self, number: int) -> None:
        """Take the fingerprint of a chunk in host memory."""
        if self._host is not None:
            self._host.take(number)

    def take_device(self, side: SideStream, chunks: Mapping[int, Sequence[torch.Tensor]]) -> bool:
        """Take the fingerprints of chunks on a device. chunks: the pieces of each chunk, by its number. Computed on the caller's current
        stream. False: the device has no memory for that, so these chunks have no fingerprints.
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
        """Enqueue the copies of the fingerprints that were computed on devices, once their side streams have begun."""
        for side, prints in self._prints:
            prints.fetch(side)

    def is_host_copy(self, number: int, content: U8) -> bool:
        """Whether a copy of a chunk in host memory has its fingerprint. Also True if none was taken."""
        return self._host is None or self._host.is_copy(number, content)

    def is_host_unchanged(self, number: int) -> bool:
        """Whether a chunk in host memory still has its fingerprint, as far as `is_host_copy` could miss a change. Its memory must exist."""
        return self._host is None or self._host.is_unchanged(number)

    def is_device_copy(self, number: int, content: U8) -> bool:
        """Whether a copy of a chunk on a device has its fingerprint. Also True if none was taken. Waits for the device."""
        return all(prints.is_copy(number, content) for _, prints in self._prints if number in prints)
