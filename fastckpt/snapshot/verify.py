"""Whether the bytes that were copied are those of the call of save.

torch counts in-place changes, but not those through `.data`, NumPy views or kernels of others. What chunks held at `save` against their
copies finds these too, as long as anything has really been overwritten: host memory by its digest, a device's by a fingerprint that is
computed in stream order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from fastckpt.events import logger
from fastckpt.format.digest import digest
from fastckpt.snapshot.side_stream import SideStream, bytes_of, joined, wait_for
from fastckpt.transform import MAX_RAW_BYTES

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

_WORDS = MAX_RAW_BYTES // 8


def weights(device: torch.device | None) -> torch.Tensor:
    """Odd numbers, one for each word of a chunk: multiplying by one can be undone, so no change of a single word goes unseen."""
    return torch.arange(1, 2 * _WORDS, 2, device=device or "cpu")


def fingerprint(content: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Of a chunk's bytes on a device, contiguous: an int64 scalar there. by: `weights` of it. Does not synchronise.

    The sum of all words times odd numbers, modulo 2^64. Not cryptographic: it is there to find overwritten memory.
    """
    if content.storage_offset() % 8:  # a shard may be cut anywhere
        content = content.clone()
    n_words, rest = divmod(content.numel(), 8)
    words = content[: 8 * n_words].view(torch.int64)
    total = (words * by[:n_words]).sum()
    if rest:
        total = total + content[8 * n_words :].sum(dtype=torch.int64)
    return total


def fingerprint_of_copy(content: U8, by: I64) -> int:
    """The same, of bytes that have come to the host. Allocates nothing: it runs beside training, within the budget."""
    n_words, rest = divmod(content.size, 8)
    total = int(np.dot(content[: 8 * n_words].view(np.int64), by[:n_words]))
    if rest:
        total += int(content[8 * n_words :].sum(dtype=np.int64))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)  # as int64 overflows


class DeviceFingerprints:
    """Of many chunks on one device, on their way to the host. `fetch` first, then `get` on any thread."""

    def __init__(self, device: torch.device, chunks: Iterable[list[torch.Tensor]]) -> None:
        """chunks: each one's pieces. Computed on the caller's current stream."""
        by = weights(device)
        self._prints = torch.stack(
            [fingerprint(joined(pieces) if len(pieces) > 1 else bytes_of(pieces[0]), by) for pieces in chunks]
        )
        self._fetched: torch.Tensor | None = None
        self._event: torch.Event | None = None

    def fetch(self, side: SideStream) -> None:
        """Enqueue their copy. The side stream has begun after they were computed."""
        try:
            target = torch.empty(self._prints.numel(), dtype=torch.int64, device="cpu", pin_memory=True)
        except RuntimeError:  # SlabPool tells of it
            target = torch.empty(self._prints.numel(), dtype=torch.int64, device="cpu")
        side.copy(bytes_of(target), [self._prints], pinned=target.is_pinned())
        self._fetched, self._event = target, side.mark()

    def get(self, position: int) -> int:
        """One of them; waits for the device."""
        assert self._fetched is not None
        assert self._event is not None
        wait_for(self._event)
        return int(self._fetched[position])


class AtSave:
    """What chunks held at the call of save. Made by the thread that trains; `is_copy` is for any."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}
        self._fingerprints: dict[int, tuple[DeviceFingerprints, int]] = {}
        self._to_fetch: list[tuple[SideStream, DeviceFingerprints]] = []
        self._weights = np.empty(0, np.int64)
        self._scratch = np.empty(0, np.uint8)

    def take_host(self, number: int, n_bytes: int, read: Callable[[U8], None]) -> None:
        """A chunk in host memory. read: fills what it is given with its bytes."""
        if not self._scratch.size:
            self._scratch = np.empty(MAX_RAW_BYTES, np.uint8)
        read(self._scratch[:n_bytes])
        self._digests[number] = digest(self._scratch[:n_bytes])

    def take_device(self, side: SideStream, chunks: dict[int, list[torch.Tensor]]) -> None:
        """Chunks on a device, by their numbers: each one's pieces. Computed on the caller's current stream."""
        self._weights = weights(None).numpy()
        try:
            prints = DeviceFingerprints(side.device, chunks.values())
        except torch.OutOfMemoryError:
            logger.warning("%s has no room for fingerprints: this snapshot is not verified", side.device)
            return
        self._to_fetch.append((side, prints))
        self._fingerprints.update({number: (prints, position) for position, number in enumerate(chunks)})

    def fetch(self) -> None:
        """Enqueue the copies of what was computed on devices, once their side streams have begun."""
        self._scratch = np.empty(0, np.uint8)
        for side, prints in self._to_fetch:
            prints.fetch(side)

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether these are the bytes that the chunk held. True, too, where nothing is known of it."""
        if number in self._digests:
            return digest(content) == self._digests[number]
        if number in self._fingerprints:
            prints, position = self._fingerprints[number]
            return fingerprint_of_copy(content, self._weights) == prints.get(position)
        return True
