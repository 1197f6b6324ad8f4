"""Fingerprints of all bytes on a device, computed there in stream order, and compared with those of the copies on the host.

A chunk is divided into rows of 32 KiB, the last one filled up with zeros; each row gives one number (`Kernels.rows` defines it). Many
chunks are joined for one operation: each operation costs the host some 10 µs, and thousands of them would fill a device's queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fastckpt._types import U8
from fastckpt.kernels import ROW_WORDS, kernels
from fastckpt.snapshot.side_stream import SideStream, bytes_of, joined, wait_for

ROW_BYTES = 8 * ROW_WORDS
_BATCH_ROWS = 1024
"""32 MiB, and as much scratch memory: then results are still in the cache of a large device when the next operation reads them."""
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as a signed number


def _rows_of(n_bytes: int) -> int:
    return -(-n_bytes // ROW_BYTES)


def keys_on(device: torch.device | str, seed: int) -> torch.Tensor:
    """The keys for the words of a row, by their place in it. Computed on the device: a copy would wait for the device."""
    return torch.arange(ROW_WORDS, device=device).mul_(_STEP).add_(seed)


@torch.no_grad()
def row_prints(chunks: Sequence[Sequence[torch.Tensor]], device: torch.device | str, seed: int) -> torch.Tensor:
    """One number for each row of each chunk, in order, on the device. Enqueued on the caller's current stream.

    chunks: the pieces of each chunk, contiguous, of one element type. seed: a signed 64-bit number. torch.OutOfMemoryError.
    """
    keys = keys_on(device, seed)
    zeros = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=device)
    contents = [joined(pieces) if len(pieces) > 1 else bytes_of(pieces[0]) for pieces in chunks]
    n_rows = [_rows_of(content.numel()) for content in contents]
    found = torch.empty(sum(n_rows), dtype=torch.int64, device=device)
    room = min(max(_BATCH_ROWS, *n_rows), found.numel())
    words, halves = (torch.empty((room, ROW_WORDS), dtype=torch.int64, device=device) for _ in range(2))
    at = first = 0
    while first < len(contents):
        end, n = first, 0
        while end < len(contents) and n + n_rows[end] <= room:
            n += n_rows[end]
            end += 1
        parts: list[torch.Tensor] = []
        for content in contents[first:end]:
            parts.append(content)
            if content.numel() % ROW_BYTES:
                parts.append(zeros[: -content.numel() % ROW_BYTES])
        x, upper = words[:n], halves[:n]
        torch.cat(parts, out=x.view(-1).view(torch.uint8))
        x.bitwise_xor_(keys)
        torch.bitwise_right_shift(x, 32, out=upper)
        x.mul_(upper)
        torch.sum(x, 1, out=found[at : at + n])
        at, first = at + n, end
    return found


class DevicePrints:
    """Fingerprints of chunks on one device, on their way to the host. Call `fetch` first; then any thread may call `is_copy`."""

    def __init__(self, device: torch.device, chunks: Mapping[int, Sequence[torch.Tensor]], seed: int) -> None:
        """chunks: the pieces of each chunk, by its number. Enqueued on the caller's current stream. torch.OutOfMemoryError."""
        self._rows: dict[int, slice] = {}
        at = 0
        for number, pieces in chunks.items():
            n = _rows_of(sum(piece.nbytes for piece in pieces))
            self._rows[number] = slice(at, at + n)
            at += n
        self._keys = keys_on("cpu", seed).numpy().view(np.uint64)
        self._prints: torch.Tensor | None = row_prints(list(chunks.values()), device, seed)
        self._fetched = torch.empty(0, dtype=torch.int64, device="cpu")
        self._event: torch.Event | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def fetch(self, side: SideStream) -> None:
        """Enqueue the copy of the fingerprints. The side stream must have begun after they were computed."""
        assert self._prints is not None
        try:
            target = torch.empty(self._prints.numel(), dtype=torch.int64, device="cpu", pin_memory=True)
        except RuntimeError:  # pinning failed; SlabPool reports it
            target = torch.empty(self._prints.numel(), dtype=torch.int64, device="cpu")
        side.copy(bytes_of(target), [self._prints], pinned=target.is_pinned())
        self._fetched, self._event, self._prints = target, side.mark(), None

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether the bytes are equal to those that the chunk held; waits for the device."""
        assert self._event is not None
        wait_for(self._event)
        expected = self._fetched.numpy().view(np.uint64)[self._rows[number]]
        found = np.empty(expected.size, np.uint64)
        kernels().rows(content, self._keys, found)
        return bool((found == expected).all())
