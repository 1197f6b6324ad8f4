"""Stretches of memory: joined, sampled, and told apart by numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastckpt._types import U8, U64

_ALL_ONES = (1 << 64) - 1
_PIECE, _EVERY = 64, 4096


def _check_stretches(addresses: U64, lengths: U64) -> None:
    """ValueError if these cannot be stretches of memory: sums of such lengths would wrap."""
    if addresses.size != lengths.size:
        raise ValueError(f"{addresses.size} addresses, {lengths.size} lengths: expected as many")
    if lengths.size * int(lengths.max(initial=0)) >= 1 << 63:
        raise ValueError(f"{lengths.size} stretches of up to {lengths.max()} bytes together are no memory")
    some = lengths > 0
    if (addresses[some] == 0).any() or (addresses[some] > np.uint64(_ALL_ONES) - lengths[some]).any():
        raise ValueError("a stretch of memory begins at address 0 or ends past the last address")


def gather(addresses: U64, lengths: U64, out: U8) -> None:
    """Join stretches of memory, which the caller keeps alive. ValueError if they are not as long as `out` together."""
    _check_stretches(addresses, lengths)
    if int(lengths.sum()) != out.size:
        raise ValueError(f"the stretches are not {out.size} bytes together")
    to = out.ctypes.data
    for address, n_bytes in zip(addresses.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(to, address, n_bytes)
        to += n_bytes


WHOLE_BELOW = 64 << 10
"""Shorter stretches of memory are sampled whole."""
_GOLDEN = 0x9E3779B97F4A7C15


def lines_bytes(lengths: U64) -> int:
    """How long the sample of `lines` is. Of stretches that memory has: together less than 2^63 bytes."""
    n = lengths.astype(np.int64)
    return int(np.where(n < WHOLE_BELOW, n, -(-n // _EVERY) * _PIECE).sum())


def lines(addresses: U64, lengths: U64, seed: int, out: U8) -> None:
    """A sample of stretches of memory, which the caller keeps alive: of each 4 KiB one line of 64 bytes, which the seed chooses; what is
    shorter than 64 KiB whole. seed: 0 … 2^64 - 1. ValueError if it is not as long as `out`.
    """
    _check_stretches(addresses, lengths)
    if not 0 <= seed <= _ALL_ONES:
        raise ValueError(f"seed is {seed}: expected 0 to {_ALL_ONES}")
    if lines_bytes(lengths) != out.size:
        raise ValueError(f"the sample does not take {out.size} bytes")
    to = pages = 0
    for address, n_bytes in zip(addresses.tolist(), lengths.tolist(), strict=True):
        if n_bytes < WHOLE_BELOW:
            ctypes.memmove(out.ctypes.data + to, address, n_bytes)
            to += n_bytes
            continue
        n = -(-n_bytes // _EVERY)
        k = np.arange(pages, pages + n, dtype=np.uint64) + np.uint64(seed)
        line = (k * np.uint64(_GOLDEN)) >> np.uint64(58)
        at = np.minimum(np.arange(n) * _EVERY + line.astype(np.int64) * _PIECE, n_bytes - _PIECE)
        memory = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)
        out[to : to + n * _PIECE] = memory[at[:, None] + np.arange(_PIECE)].reshape(-1)
        to += n * _PIECE
        pages += n


ROW_WORDS = 4096
_BLOCK_ROWS = 4  # 128 KiB, and as much again: they stay in the cache


def rows(data: Any, keys: U64, out: U64) -> None:
    """A number for each 32 KiB of bytes, the last ones made up by zeros: the sum of all words, xor the key of their place in the row, each
    times its own upper half as a signed number, modulo 2^64. ValueError if there are not as many as `out` has.
    """
    view = np.frombuffer(data, np.uint8)
    if keys.size != ROW_WORDS:
        raise ValueError(f"{keys.nbytes} bytes of keys: expected {8 * ROW_WORDS}")
    if -(-view.size // (8 * ROW_WORDS)) != out.size:
        raise ValueError(f"{view.size} bytes are not {out.size} rows")
    whole = view.size // (8 * ROW_WORDS)
    words = view[: whole * 8 * ROW_WORDS].view(np.uint64).reshape(whole, ROW_WORDS)
    for first in range(0, whole, _BLOCK_ROWS):
        some = slice(first, min(first + _BLOCK_ROWS, whole))
        out[some] = _row_sums(words[some], keys)
    if whole < out.size:
        last = np.zeros(8 * ROW_WORDS, np.uint8)
        last[: view.size - whole * last.size] = view[whole * last.size :]
        out[whole:] = _row_sums(last.view(np.uint64)[None], keys)


def _row_sums(words: U64, keys: U64) -> U64:
    x = words ^ keys
    return np.asarray((x * (x.view(np.int64) >> 32).view(np.uint64)).sum(axis=1, dtype=np.uint64))
