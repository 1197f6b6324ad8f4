"""Fingerprints: whether the bytes that were staged are those of the call of save.

torch counts in-place changes, but not those through `.data`, NumPy views or kernels of others. A fingerprint taken at `save`, in
stream order, against one of the staged bytes finds these too, as long as anything has really been overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from fastckpt.snapshot.lane import Lane, bytes_of, joined, wait_for
from fastckpt.transform import MAX_RAW_BYTES

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

_WORDS = MAX_RAW_BYTES // 8


def weights(device: torch.device | None) -> torch.Tensor:
    """Odd numbers, one for each word of a chunk: multiplying by one can be undone, so no change of a single word goes unseen."""
    return torch.arange(1, 2 * _WORDS, 2, device=device or "cpu")


def fingerprint(content: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Of a chunk's bytes on a device, contiguous and aligned to 8: an int64 scalar there. by: `weights` of it. Does not synchronise.

    The sum of all words times odd numbers, modulo 2^64. Not cryptographic: it is there to find overwritten memory.
    """
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

    def fetch(self, lane: Lane) -> None:
        """Enqueue their copy. The lane has begun after they were computed."""
        try:
            target = torch.empty(self._prints.numel(), dtype=torch.int64, pin_memory=True)
        except RuntimeError:  # SlabPool tells of it
            target = torch.empty(self._prints.numel(), dtype=torch.int64)
        lane.copy(bytes_of(target), [self._prints], pinned=target.is_pinned())
        self._fetched, self._event = target, lane.mark()

    def get(self, position: int) -> int:
        """One of them; waits for the device."""
        assert self._fetched is not None
        assert self._event is not None
        wait_for(self._event)
        return int(self._fetched[position])
