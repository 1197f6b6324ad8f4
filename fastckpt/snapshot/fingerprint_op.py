"""The torch operator `fastckpt::fingerprint`: two words for each of many tensors, as `kernels.fingerprint` computes them, on their device.

CPU    the loop of the native module
CUDA   the kernel of fingerprint_kernel.py; where there is none, as other devices
meta   the shape
other  torch's own operators: 26 passes over 8 MiB that stay in a large device's cache
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from fastckpt.kernels.fingerprint import fingerprint
from fastckpt.snapshot.fingerprint_kernel import kernel_on

_BATCH_BYTES = 8 << 20
"""Three times as much scratch memory is needed."""
_STEPS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_FACTORS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
_SHIFT = 33


def fingerprints(chunks: Sequence[torch.Tensor], keys: tuple[int, int]) -> torch.Tensor:
    """A row of two numbers for each tensor, in an int64 tensor on their device. Enqueued on the caller's current stream.

    chunks: one or more, of one device; their bytes count as if they were contiguous. keys: two signed numbers of 64 bits.
    torch.OutOfMemoryError; RuntimeError of the device.
    """
    _define()
    found: torch.Tensor = torch.ops.fastckpt.fingerprint(list(chunks), *keys)
    return found


@functools.cache
def _define() -> torch.library.Library:
    """Make the operator known to torch, once a process. The registration ends with the object that is returned."""
    library = torch.library.Library("fastckpt", "FRAGMENT")
    library.define("fingerprint(Tensor[] chunks, int key_a, int key_b) -> Tensor")
    library.impl("fingerprint", _on_cpu, "CPU")
    library.impl("fingerprint", _on_cuda, "CUDA")
    library.impl("fingerprint", _on_meta, "Meta")
    library.impl("fingerprint", _on_any, "CompositeExplicitAutograd")
    return library


@torch.no_grad()
def _on_cpu(chunks: list[torch.Tensor], key_a: int, key_b: int) -> torch.Tensor:
    keys = np.array([key_a, key_b], np.int64).view(np.uint64)
    out = torch.empty((len(chunks), 2), dtype=torch.int64)
    rows = out.numpy().view(np.uint64)
    for row, chunk in zip(rows, chunks, strict=True):
        fingerprint(_bytes_of(chunk).numpy(), keys, row)
    return out


def _on_meta(chunks: list[torch.Tensor], key_a: int, key_b: int) -> torch.Tensor:
    return chunks[0].new_empty((len(chunks), 2), dtype=torch.int64)


@torch.no_grad()
def _on_cuda(chunks: list[torch.Tensor], key_a: int, key_b: int) -> torch.Tensor:
    device = chunks[0].device
    with torch.cuda.device(device):
        sums = torch.zeros((len(chunks), 2), dtype=torch.int64, device=device)  # makes the context current, too
        kernel = kernel_on(torch.cuda.current_device())
        if kernel is None:
            return _on_any(chunks, key_a, key_b)
        contents = [_bytes_of(chunk) for chunk in chunks]
        table = torch.tensor([(content.data_ptr(), content.numel()) for content in contents], dtype=torch.int64)
        # Pinned, because a copy of pageable memory may wait for all that the stream has been given.
        on_device = table.pin_memory().to(device, non_blocking=True)
        longest_bytes = max(content.numel() for content in contents)
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.launch(on_device, sums, longest_bytes, (key_a, key_b), stream)
    return sums


@torch.no_grad()
def _on_any(chunks: list[torch.Tensor], key_a: int, key_b: int) -> torch.Tensor:
    out = chunks[0].new_empty((len(chunks), 2), dtype=torch.int64)
    at = 0
    for n_bytes, alike in itertools.groupby(chunks, key=lambda chunk: chunk.nbytes):
        contents = [_bytes_of(chunk) for chunk in alike]
        n_together = max(1, _BATCH_BYTES // max(8, n_bytes))
        for first in range(0, len(contents), n_together):
            some = contents[first : first + n_together]
            _sum_up(some, n_bytes, (key_a, key_b), out[at : at + len(some)])
            at += len(some)
    return out


def _sum_up(contents: Sequence[torch.Tensor], n_bytes: int, keys: tuple[int, int], out: torch.Tensor) -> None:
    """Fingerprints of contents of one length."""
    for s, key in enumerate(keys):
        out[:, s].fill_(_signed(_mixed(n_bytes ^ (key % (1 << 64)))))
    n_words = -(-n_bytes // 8)
    n_at_once = max(1, min(n_words, _BATCH_BYTES // 8 // len(contents)))
    scratch = [out.new_empty(len(contents) * n_at_once) for _ in range(3)]
    for first in range(0, n_words, n_at_once):
        n = min(n_at_once, n_words - first)
        words, x, shifted = (one[: len(contents) * n].view(len(contents), n) for one in scratch)
        _join(contents, 8 * first, 8 * (first + n), words)
        for s, (key, step) in enumerate(zip(keys, _STEPS, strict=True)):
            places = torch.arange(first + 1, first + n + 1, out=out.new_empty(n))
            _mix(words, places.mul_(_signed(step)).add_(key), x, shifted)
            out[:, s].add_(x.sum(1))


def _join(contents: Sequence[torch.Tensor], start: int, stop: int, out: torch.Tensor) -> None:
    """A stretch of each content into its row, filled up with zeros."""
    parts: list[torch.Tensor] = []
    for content in contents:
        parts.append(content[start:stop])
        if stop > content.numel():
            parts.append(content.new_zeros(stop - content.numel()))
    torch.cat(parts, out=out.view(-1).view(torch.uint8))


def _mix(words: torch.Tensor, keys: torch.Tensor, x: torch.Tensor, shifted: torch.Tensor) -> None:
    """x = what a word adds to the sum. shifted: scratch."""
    torch.bitwise_xor(words, keys, out=x)
    for factor in (*_FACTORS, None):
        torch.bitwise_right_shift(x, _SHIFT, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - _SHIFT)) - 1))  # torch shifts copies of the sign in
        if factor is not None:
            x.mul_(_signed(factor))


def _mixed(x: int) -> int:
    for factor in _FACTORS:
        x = (x ^ (x >> _SHIFT)) * factor % (1 << 64)
    return x ^ (x >> _SHIFT)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    return flat if flat.dtype is torch.uint8 else flat.view(torch.uint8)
