"""Operations on stretches of memory: joining them, sampling them, and computing numbers that tell contents apart."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastckpt._types import U8, U64

_ALL_ONES = (1 << 64) - 1
_PIECE, _EVERY = 64, 4096


def _check_stretches(addresses: U64, lengths: U64) -> None:
    """ValueError if addresses and lengths cannot be stretches of memory: the sum of such lengths would overflow."""
    if addresses.size != lengths.size:
        raise ValueError(f"{addresses.size} addresses, {lengths.size} lengths: expected as many")
    if lengths.size * int(lengths.max(initial=0)) >= 1 << 63:
        raise ValueError(f"{lengths.size} stretches of up to {lengths.max()} bytes together are no memory")
    some = lengths > 0
    if (addresses[some] == 0).any() or (addresses[some] > np.uint64(_ALL_ONES) - lengths[some]).any():
        raise ValueError("a stretch of memory begins at address 0 or ends past the last address")


_PART = 64 << 10


def equal(a: Any, b: Any) -> bool:
    """Whether two buffers have the same bytes; ends at the first 64 KiB that differ."""
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if x.size != y.size:
        return False
    return all(np.array_equal(x[at : at + _PART], y[at : at + _PART]) for at in range(0, x.size, _PART))


def gather(addresses: U64, lengths: U64, out: U8) -> None:
    """Join stretches of memory, which the caller keeps alive. ValueError if their total length is not that of `out`."""
    _check_stretches(addresses, lengths)
    if int(lengths.sum()) != out.size:
        raise ValueError(f"the stretches are not {out.size} bytes together")
    to = out.ctypes.data
    for address, n_bytes in zip(addresses.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(to, address, n_bytes)
        to += n_bytes


WHOLE_BELOW = 64 << 10
"""Stretches shorter than this are sampled completely."""
_GOLDEN = 0x9E3779B97F4A7C15


def lines_bytes(lengths: U64) -> int:
    """Length of the sample that `lines` takes. The stretches must be real memory: together less than 2^63 bytes."""
    n = lengths.astype(np.int64)
    return int(np.where(n < WHOLE_BELOW, n, -(-n // _EVERY) * _PIECE).sum())


def lines(addresses: U64, lengths: U64, seed: int, out: U8) -> None:
    """Sample stretches of memory, which the caller keeps alive: of each 4 KiB one line of 64 bytes, chosen by the seed; stretches shorter
    than 64 KiB completely. seed: 0 … 2^64 - 1. ValueError if the sample is not as long as `out`.
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
_BLOCK_ROWS = 4  # 128 KiB, and as much again for results: both stay in the cache


def rows(data: Any, keys: U64, out: U64) -> None:
    """One number for each row of 32 KiB; the last row is filled up with zeros. Each word is xored with the key of its place in the row, and
    multiplied by its own upper half as a signed number; the row's number is the sum of these products modulo 2^64. ValueError if the number
    of rows is not the length of `out`.
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


_STEPS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_BLOCK_WORDS = 1 << 15


def fingerprint(data: Any, keys: U64, out: U64) -> None:
    """Two words that stand for all of `data`: why contents have different ones, csrc/cuda/fingerprint.cuh tells. Word 0 is the number of
    bytes; words 1, 2, … are the bytes in groups of 8, the last one filled up with zeros. Word i, xored with key[s] + i * step[s], is mixed;
    out[s] is the sum of the results. All modulo 2^64. ValueError unless there are two keys and room for two words.
    """
    view = np.frombuffer(data, np.uint8)
    if keys.size != 2 or out.size != 2:
        raise ValueError(f"{keys.size} keys, room for {out.size} words: expected 2 of each")
    last = np.zeros(8, np.uint8)
    last[: view.size % 8] = view[view.size - view.size % 8 :]
    whole = view[: view.size // 8 * 8].view(np.uint64)
    out[:] = 0
    _absorb(np.array([view.size], np.uint64), 0, keys, out)
    for first in range(0, whole.size, _BLOCK_WORDS):
        _absorb(whole[first : first + _BLOCK_WORDS], first + 1, keys, out)
    if view.size % 8:
        _absorb(last.view(np.uint64), whole.size + 1, keys, out)


def _absorb(words: U64, first: int, keys: U64, out: U64) -> None:
    places = np.arange(first, first + words.size, dtype=np.uint64)
    for s, step in enumerate(_STEPS):
        out[s : s + 1] += _mixed(words ^ (places * np.uint64(step) + keys[s : s + 1])).sum(dtype=np.uint64)


def _mixed(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return np.asarray(x ^ (x >> np.uint64(33)))


def _row_sums(words: U64, keys: U64) -> U64:
    x = words ^ keys
    return np.asarray((x * (x.view(np.int64) >> 32).view(np.uint64)).sum(axis=1, dtype=np.uint64))
